"""Writes models and adapters as the folders that transformers, peft and vLLM load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel

from trainer_svc.worker.adapters import lora
from trainer_svc.worker.adapters.given import CONFIG_FILE, WEIGHTS_FILE
from trainer_svc.worker.quantized.record import Quantization


def write_adapter(adapter: PeftModel, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes the adapter as PEFT does; `weights` are those of `lora.tensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(lora.config_json(adapter), encoding="utf-8")
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
