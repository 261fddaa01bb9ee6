"""What a reward may be."""

from __future__ import annotations

import math

MAX_REWARD = 1e15
"""Largest size of a reward or component: not far beyond it, the squares and sums of a group are infinite."""


def is_reward(value: float) -> bool:
    """Whether it is a number that can be trained on."""
    return math.isfinite(value) and abs(value) <= MAX_REWARD


def why_not(value: float) -> str:
    """What is wrong with such a number: `nan`, `1e+39, beyond 1e+15`."""
    return f"{value:g}, beyond {MAX_REWARD:g}" if math.isfinite(value) else f"{value}"
