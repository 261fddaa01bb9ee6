"""Which inputs of adapters dropout keeps: of up to eight layers that read the same input one bit each, in one byte.

Legend: T tokens, E input features.
"""

from __future__ import annotations

import torch

MOST_LAYERS = 8
"""Bits of a byte."""


def draw(x: torch.Tensor, layers: int, rate: float) -> torch.Tensor:
    """uint8 [T, E] for x [T, E]: bit i is set, with the probability 1 - rate, where layer i keeps its input.

    Drawn layer by layer, in torch's default generator: on a CPU as `torch.nn.Dropout` does, so that masks are the same.
    """
    kept = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for layer in range(layers):
        one = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - rate)
        kept |= one.to(torch.uint8) << layer
    return kept


def dropped(x: torch.Tensor, kept: torch.Tensor, layer: int) -> torch.Tensor:
    """x [T, E] with zeros where `layer` does not keep it; what is kept is not scaled up, which costs less later."""
    return x * ((kept >> layer) & 1)
