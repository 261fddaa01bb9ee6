"""Weights of models of which some are quantised: in full, by the names of the plain model."""

from __future__ import annotations

import torch

from trainer_svc.worker.quantized.linear import QuantizedLinear
from trainer_svc.worker.shares import collects, whole_state


def weight_of(layer: torch.nn.Module) -> torch.Tensor:
    """A layer's matrix: its weight, or what its packed weight means, in float32."""
    weight: torch.Tensor = layer.full_weight() if isinstance(layer, QuantizedLinear) else layer.weight.detach()  # type: ignore[operator]
    return weight


def decoded_state(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict with the matrices of quantised layers in place of their parts, in `dtype`: on rank 0 (see
    `shares.collected`).
    """
    state: dict[str, torch.Tensor] = whole_state(model)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            weight = layer.full_weight(dtype)
            if collects():
                for part in layer.storage.parts:
                    state.pop(f"{name}.{part}", None)
                state[f"{name}.weight"] = weight.to(state[f"{name}.weight"].device)
            del weight
    return state


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable weights and all weights; shared ones once, quantised ones by what they stand for."""
    quantised = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    packed = {id(layer.weight): layer for layer in quantised}
    scales = {id(getattr(layer, part, None)) for layer in quantised for part in layer.storage.parts}
    weights = {id(weight): weight for weight in model.parameters() if id(weight) not in scales}
    sizes = {
        key: packed[key].in_features * packed[key].out_features if key in packed else weight.numel()
        for key, weight in weights.items()
    }
    return sum(sizes[key] for key, weight in weights.items() if weight.requires_grad), sum(sizes.values())
