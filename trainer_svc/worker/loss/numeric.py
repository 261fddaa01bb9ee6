"""Exponentials that stay finite, so that a token which is masked afterwards cannot turn a gradient into NaN."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def safe_exp(x: Tensor) -> Tensor:
    """e^x, constant above half the dtype's log range (44 in float32, 354 in float64), where a ratio means nothing."""
    return x.clamp(max=_limit(x)).exp()


def k3(x: Tensor) -> Tensor:
    """e^x − x − 1 ≥ 0: Schulman's low-variance estimate of a KL divergence from a log ratio x. Exact near 0."""
    x = x.clamp(max=_limit(x))
    return x.expm1() - x


def at_least_one(count: Tensor | float) -> Tensor | float:
    """A divisor: nothing to average gives 0, not NaN."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _limit(x: Tensor) -> float:
    return math.log(torch.finfo(x.dtype).max) / 2
