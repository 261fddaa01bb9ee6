"""Adapters on layers that a checkpoint has as one, and that vLLM takes adapters for by the names of their parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"

Parts = Mapping[str, Sequence[tuple[str, int]]]
"""By the last part of a layer's name: the names of its parts, and in what proportion they divide its outputs."""


def fused_layers(manager: Any) -> dict[str, list[tuple[str, int]]]:
    """The layers that vLLM's adapter manager knows by their parts alone; names of checkpoints may be among them.

    GLM-4 has its gate and up projections in one matrix, `gate_up_proj`: as for Llama, which has two, vLLM expects
    adapters for `gate_proj` and `up_proj`.
    """
    found: dict[str, list[tuple[str, int]]] = {}
    for name, layer in manager.modules.items():
        last = name.rpartition(".")[2]
        parts, sizes = manager.packed_modules_mapping.get(last, ()), getattr(layer, "output_slices", ())
        if len(parts) > 1 and len(parts) == len(sizes):
            found[last] = list(zip(parts, map(int, sizes), strict=True))
    return found


def split_fused(directory: Path, fused: Parts) -> None:
    """Rewrites the adapter in `directory` where it is on such layers: A is that of every part, B is cut."""
    file = directory / WEIGHTS
    tensors = load_file(file)
    split = {part: value for name, tensor in tensors.items() for part, value in _parts(name, tensor, fused)}
    if split.keys() != tensors.keys():
        file.unlink()  # it may be a link to the image that was pushed, which is left as it is
        save_file(split, file)


def _parts(name: str, tensor: torch.Tensor, fused: Parts) -> Iterator[tuple[str, torch.Tensor]]:
    layer, side, rest = name.rpartition(".lora_")
    prefix, dot, last = layer.rpartition(".")
    if last not in fused:
        yield name, tensor
        return
    begin, total = 0, sum(size for _, size in fused[last])
    for part, size in fused[last]:
        rows = tensor.shape[0] * size // total
        value = tensor if rest.startswith("A") else tensor[begin : begin + rows]
        yield f"{prefix}{dot}{part}{side}{rest}", value.clone()
        begin += rows
