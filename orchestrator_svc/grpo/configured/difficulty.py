"""When prompts are laid aside for being too easy or too hard, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Pool(StrEnum):
    """Where a prompt is laid aside."""

    EASY = "easy"
    HARD = "hard"


Moves = Mapping[str, Pool | None]
"""Prompts, by key, and where they went; None is back to the normal pool."""


@dataclass(frozen=True)
class Difficulty:
    """When prompts are laid aside, and when they come back; see `surogate.config.shaping.BufferConfig`."""

    easy_threshold: float | None = None
    hard_threshold: float | None = None
    min_normal: int = 0
    recycle_easy: float = 0.0
    recycle_hard: float = 0.0
    easy_fraction: float = 0.0
    hard_fraction: float = 0.0
    seed: int = 0

    def pool(self, mean_reward: float) -> Pool | None:
        """Where a prompt with this mean reward belongs."""
        if self.easy_threshold is not None and mean_reward >= self.easy_threshold:
            return Pool.EASY
        if self.hard_threshold is not None and mean_reward <= self.hard_threshold:
            return Pool.HARD
        return None
