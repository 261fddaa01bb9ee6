"""Time of phases that many tasks share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Wall-clock seconds during which at least one task was inside `running()`."""

    def __init__(self) -> None:
        self._total = 0.0
        self._active = 0
        self._since = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts the time of the block, once for all blocks that overlap."""
        if self._active == 0:
            self._since = time.perf_counter()
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1
            if self._active == 0:
                self._total += time.perf_counter() - self._since

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        running = time.perf_counter() - self._since if self._active else 0.0
        return self._total + running
