"""E2M1, the four bits of NVFP4: what codes mean, the code nearest to a value, and two of them in a byte."""

from __future__ import annotations

import itertools
from functools import cache

import torch

LARGEST = 6.0
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by code; bit 3 is the sign."""


def nearest(values: torch.Tensor) -> torch.Tensor:
    """The nearest code, ties to the even one, beyond 6 that of 6; uint8."""
    codes = torch.bucketize(values.abs(), _edges(values.device), out_int32=True).to(torch.uint8)
    return codes | (values < 0).to(torch.uint8) << 3


def decoded(codes: torch.Tensor) -> torch.Tensor:
    """What codes mean, in float32."""
    return _table(codes.device)[codes.int()]


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte [..., n] → [..., n / 2], the first in the low bits."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpacked(pairs: torch.Tensor) -> torch.Tensor:
    """The codes of bytes [..., n / 2] → [..., n]."""
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)


@cache
def _edges(device: torch.device) -> torch.Tensor:
    middles = torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(_VALUES)], dtype=torch.float32)
    odd = torch.arange(len(middles)) % 2 == 1  # a tie above an odd code goes up: the middle itself is beyond the edge
    return torch.where(odd, torch.nextafter(middles, torch.zeros(())), middles).to(device)


@cache
def _table(device: torch.device) -> torch.Tensor:
    return torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=torch.float32, device=device)
