"""Which inputs dropout leaves to an adapter, kept as one byte an input feature and token and not as numbers.

Of up to eight layers that read the same input it is one byte for all of them, of which each has a bit.

Legend: T tokens, E input features, r rank.
"""

from __future__ import annotations

from typing import Any

import torch

MOST_LAYERS = 8
"""Bits of a byte."""

_STEPS = 1 << 16
"""A CPU draws 16 bits for each input, four inputs at a time: a rate is rounded to 1 / 65,536."""


def draw(x: torch.Tensor, rate: float) -> torch.Tensor:
    """uint8, of the shape of x: 1 with the probability 1 - rate, else 0, from torch's default generator."""
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - rate).to(torch.uint8)
    # bernoulli_ draws one by one in a single thread, and takes as long as the products of a small model.
    bits = torch.randint(-(1 << 63), (1 << 63) - 1, (-(-x.numel() // 4),), dtype=torch.int64).view(torch.int16)
    kept = bits[: x.numel()] >= round(rate * _STEPS) - _STEPS // 2
    return kept.view(torch.uint8).view(x.shape)  # numbers are multiplied by bytes in half the time of by truth values


def draw_for(layers: int, x: torch.Tensor, rate: float) -> torch.Tensor:
    """uint8, of the shape of x: bit i is what `draw` says of layer i. Layers are drawn in their order."""
    kept = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for layer in range(layers):
        kept |= draw(x, rate) << layer
    return kept


def dropped(x: torch.Tensor, kept: torch.Tensor, layer: int) -> torch.Tensor:
    """x [T, E] with zeros where `layer` does not keep it; what is kept is not scaled up, which costs less later."""
    return x * ((kept >> layer) & 1)


def low_of_kept(x: torch.Tensor, a: torch.Tensor, rate: float) -> torch.Tensor:
    """What an adapter's A [r, E] makes of x [..., E] with dropout drawn anew, [..., r]: its gradients need x and a byte
    an input, and no second x.
    """
    found: torch.Tensor = _LowOfKept.apply(x, a, draw(x, rate), 1 - rate)  # type: ignore[no-untyped-call]
    return found


class _LowOfKept(torch.autograd.Function):
    """x [..., E], A [r, E], kept [..., E] → (kept·x)·Aᵀ / share."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, kept: torch.Tensor, share: float) -> torch.Tensor:
        ctx.save_for_backward(x, a, kept)
        ctx.share = share
        return ((x * kept) @ a.T).div_(share)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, kept = ctx.saved_tensors
        dlow = grads[0] / ctx.share
        da = dlow.flatten(0, -2).T @ (x * kept).flatten(0, -2) if ctx.needs_input_grad[1] else None
        dx = (dlow @ a).mul_(kept) if ctx.needs_input_grad[0] else None
        return dx, da, None, None
