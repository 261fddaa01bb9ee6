"""Estimate of the time that a job still needs."""

from __future__ import annotations

import time
from collections.abc import Callable

_WEIGHT = 0.1


class Eta:
    """Smoothed seconds per step, from when steps were reported."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._step = 0
        self._at = 0.0
        self._seconds_per_step = 0.0

    def interrupt(self) -> None:
        """Notes that the time up to the next step says nothing about the pace."""
        self._step = 0

    def observe(self, step: int, max_steps: int) -> float | None:
        """Notes that `step` is done; returns seconds to the last step, or None while that cannot be told, and after it:
        steps say nothing of how long a model takes to be written."""
        now, previous = self._clock(), self._step
        steps, seconds = step - previous, now - self._at
        self._step, self._at = step, now
        if previous and steps > 0:
            rate = seconds / steps
            known = self._seconds_per_step
            self._seconds_per_step = known + _WEIGHT * (rate - known) if known else rate
        if not self._seconds_per_step or step >= max_steps:
            return None
        return (max_steps - step) * self._seconds_per_step
