"""Learning-rate schedules: pure functions of the step.

The factor by which `learning_rate` is multiplied in optimiser step s (from 0) of `total`: it rises linearly from 0 over
`warmup` steps (the very first step of a warm-up has the factor 0, as in transformers), then follows its curve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "cosine", "wsd", "constant"]

WSD_COOLDOWN_PART = 10
"""`wsd` without `cooldown_steps` cools down over one such part of all steps."""


@dataclass(frozen=True)
class Schedule:
    """A schedule of `total` optimiser steps.

    `linear` and `cosine` fall to `final_fraction` by step `total - cooldown` and then linearly from there to 0 if there
    is a cool-down. `wsd` and `constant` stay at 1 until step `total - cooldown` and then fall linearly to
    `final_fraction`. Past `total` the last value holds. `total` 0 (not known): the factor stays 1 after the warm-up.
    """

    kind: Kind
    total: int
    warmup: int = 0
    cooldown: int = 0
    final_fraction: float = 0.0

    @classmethod
    def of(
        cls,
        kind: Kind,
        total: int,
        *,
        warmup_steps: int,
        warmup_ratio: float,
        cooldown_steps: int,
        final_fraction: float,
    ) -> Schedule:
        """The schedule of a configuration: `warmup_steps` wins over `warmup_ratio` of all steps (rounded up)."""
        warmup = warmup_steps if warmup_steps > 0 else math.ceil(warmup_ratio * total)
        cooldown = cooldown_steps
        if kind == "wsd" and cooldown == 0:
            cooldown = max(1, total // WSD_COOLDOWN_PART)
        warmup = min(warmup, total) if total > 0 else warmup
        return cls(kind, total, warmup, min(cooldown, max(total - warmup, 0)), final_fraction)

    def factor(self, step: int) -> float:
        """The factor, in [0, 1], of optimiser step `step`, counted from 0."""
        if step < self.warmup:
            return step / self.warmup
        if self.total <= 0:
            return 1.0
        end = self.total - self.cooldown
        if self.kind in ("wsd", "constant"):
            if self.cooldown == 0 or step < end:
                return 1.0
            return _blend(1.0, self.final_fraction, min(1.0, (step - end) / self.cooldown))
        if step >= end and self.cooldown > 0:
            return _blend(self.final_fraction, 0.0, min(1.0, (step - end) / self.cooldown))
        done = min(1.0, (step - self.warmup) / max(1, end - self.warmup))
        if self.kind == "linear":
            return _blend(1.0, self.final_fraction, done)
        return self.final_fraction + (1.0 - self.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * done))


def _blend(start: float, end: float, done: float) -> float:
    """From `start` to `end`, linearly, as `done` goes from 0 to 1."""
    return start + (end - start) * done
