"""`surogate merge`: adds a LoRA adapter to the weights of its base and writes the result as a model of its own.

torch is loaded when the flags are read, so that `--help` and a wrong path answer at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from surogate.errors import InvalidInputError, SurogateError, Violation

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FAILED, USAGE = 1, 2
"""Exit codes: the disk or the machine refused; what was given is wrong."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    given = _parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("torchao", "torch.utils._pytree"):  # what they lack, and what they will change, is not the user's
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        base = check(given.adapter, given.base, given.output)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters in peft's is checked here, and refused
            merge(given.adapter, base, given.output, given.dtype)
    except SurogateError as error:
        sys.stderr.write("".join(f"error: {line}\n" for line in error.message.splitlines()))
        return USAGE if isinstance(error, InvalidInputError) else FAILED
    except OSError as error:
        sys.stderr.write(f"error: could not write {given.output}: {error}; nothing was left there\n")
        return FAILED
    sys.stdout.write(f"{given.output}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="surogate merge",
        description="Merge a LoRA adapter into its base model: writes a model that is used without the adapter.",
    )
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="folder of the PEFT adapter")
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="the model that the adapter was trained on: a folder, or a name on the hub. Default: the one that the "
        "adapter's adapter_config.json names",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write; new, or empty")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the weights that are written; the sums are float32 in any case. Default: the base's",
    )
    return parser


def check(adapter: Path, base: str | None, output: Path) -> str:
    """Looks at the paths; returns the base. Raises InvalidInputError naming the flag that is wrong."""
    missing = [name for name in ADAPTER_FILES if not (adapter / name).is_file()]
    if missing:
        raise wrong("adapter", f"{adapter} is not a PEFT adapter's folder: it has no {' and no '.join(missing)}")
    try:
        config = json.loads((adapter / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
        kind, named = config.get("peft_type"), config.get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise wrong("adapter", f"{adapter / ADAPTER_FILES[0]} is not a JSON object: {error}") from error
    if kind != "LORA":
        raise wrong("adapter", f"{adapter} is a {kind} adapter; only LORA can be merged")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise wrong("output", f"{output} is there already and is not an empty folder; choose another")
    found = base or named
    if not found:
        raise wrong("base", f"is needed: {adapter / ADAPTER_FILES[0]} names no base model")
    from trainer_svc.worker.paths import is_local

    if is_local(found) and not (Path(found).expanduser() / "config.json").is_file():
        said = "" if base else f" (the base that {adapter / ADAPTER_FILES[0]} names)"
        raise wrong("base", f"{found}{said} is not a model's folder: it has no config.json")
    return str(Path(found).expanduser()) if is_local(found) else found


def wrong(flag: str, description: str) -> InvalidInputError:
    """An error that names a flag."""
    violation = Violation(f"--{flag}", description)
    return InvalidInputError(str(violation), violations=[violation])


def merge(adapter: Path, base: str, output: Path, dtype: str = "auto") -> None:
    """Writes `base` plus `adapter` into the folder `output`, all of it or nothing.

    Raises InvalidInputError for an adapter that does not fit its base, and OSError if the disk refuses.
    """
    import torch
    from transformers import AutoTokenizer

    from surogate.storage.whole import new_folder
    from trainer_svc.worker.folders.files import write_model

    model = _load_base(base, adapter)
    stored = getattr(torch, dtype) if dtype != "auto" else model.dtype
    merged = add(model, adapter, stored)
    # The trainer puts its tokenizer, with the chat template that was trained with, beside the adapter.
    tokenizer = AutoTokenizer.from_pretrained(adapter if (adapter / "tokenizer_config.json").is_file() else base)
    with new_folder(output) as temporary:
        write_model(merged, merged.state_dict(), stored, temporary)
        tokenizer.save_pretrained(temporary)


def _load_base(base: str, adapter: Path) -> PreTrainedModel:
    """The model that the adapter was trained on: with weights as they came out of quantising, if they were."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig

    from trainer_svc.worker.model.modeling import read_decoded
    from trainer_svc.worker.quantized.loading import dequantize_layers, read_quantized
    from trainer_svc.worker.quantized.record import Quantization

    try:
        quantization = Quantization.read(adapter)
        if quantization is not None and Quantization.read(Path(base)) == quantization:
            quantization = None  # it is the base as it came out of quantising
    except ValueError as error:
        raise wrong("adapter", str(error)) from error
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        if quantization is None:
            return read_decoded(base, config, "auto")[0]
        model, _ = read_quantized(base, config, quantization, torch.device("cpu"))
        dequantize_layers(model, quantization.dtype)
        return model
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise wrong("base", f"could not load {base}: {_first_line(error)}") from error


def add(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Adds an adapter to the weights of `model`. Raises InvalidInputError if it does not fit."""
    from trainer_svc.worker.adapters.given import FAILURES, add_adapter, first_line

    try:
        return add_adapter(model, folder, dtype)
    except FAILURES as error:
        raise wrong("adapter", f"{folder} does not fit the base: {first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error.args[0] if error.args else error).strip()
    return text.splitlines()[0] if text else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
