"""Writes models and adapters as the folders that transformers, peft and vLLM load; nothing is half-written for long."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel

from trainer_svc.worker.adapters import lora
from trainer_svc.worker.quantized.record import Quantization

TEMPORARY = ".tmp-"
"""Names of folders and files that are not complete begin so."""

RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers tell that the disk refused: by exceptions of their own, the number in the text."""


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` (and replaces what was there) when the block ends without error.

    All is on disk before the name is: after a crash there is either the whole folder or none. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        remove_folder(path)
        temporary.rename(path)
        sync(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        refused = RUST_OS_ERROR.search(str(error))
        if refused is not None and not isinstance(error, OSError):
            raise OSError(int(refused[1]), str(error)) from error
        raise


def remove_folder(path: Path) -> None:
    """Deletes a folder so that a crash leaves no half of it under its name."""
    if not path.exists():
        return
    doomed = path.parent / f"{TEMPORARY}deleted-{path.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a crash left half-written."""
    for path in folder.glob(f"{TEMPORARY}*") if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def move_files(source: Path, target: Path) -> None:
    """Moves every file of one folder into another, each replacing its namesake at once."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        path.replace(target / path.name)
    sync(target)


def sync_tree(folder: Path) -> None:
    """Waits until a folder and all in it are on disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Waits until one file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_adapter(adapter: PeftModel, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes the adapter as PEFT does; `weights` are those of `lora.tensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), folder / lora.WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / lora.CONFIG_FILE).write_text(lora.config_json(adapter), encoding="utf-8")
    quantization = Quantization.noted(adapter.get_base_model())
    if quantization is not None:
        quantization.write(folder)


def write_model(model: PreTrainedModel, state: Mapping[str, torch.Tensor], dtype: torch.dtype, folder: Path) -> None:
    """Writes a transformers model whose weights are `state`, in `dtype`."""
    stored = {
        name: value.detach().to(dtype) if value.is_floating_point() else value.detach() for name, value in state.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=_shared_as_in(state, stored))
    config = folder / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shared_as_in(state: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The converted tensors, shared where the originals are, so that tied weights are written once."""
    first: dict[tuple[int, torch.Size], torch.Tensor] = {}
    return {name: first.setdefault((value.data_ptr(), value.shape), stored[name]) for name, value in state.items()}
