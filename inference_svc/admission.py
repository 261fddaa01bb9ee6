"""How many sequences are taken at once, and when to come back for those that are not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from surogate.errors import BusyError

_SMOOTHING = 0.1
_LEAST, _MOST = 0.05, 30.0


class Admission:
    """Counts the sequences in the engine: `running` at once, and at most `waiting` more.

    A single call may bring more than the bound when nothing else is there, else it could never be served.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self._running = running
        self._limit = running + waiting
        self.in_flight = 0
        """Sequences admitted and not ended."""
        self._seconds_per_sequence = 1.0 / max(running, 1)
        self._last_end: float | None = None

    @property
    def queue_length(self) -> int:
        """Sequences that wait for their turn, about."""
        return max(self.in_flight - self._running, 0)

    @contextmanager
    def admit(self, sequences: int) -> Iterator[None]:
        """Holds places for `sequences` within the block. Raises BusyError when the queue is full."""
        over = self.in_flight + sequences - self._limit
        if over > 0 and self.in_flight > 0:
            raise BusyError(
                f"{self.in_flight} sequences are in the queue, which takes {self._limit}; try again or add replicas",
                retry_after=min(max(over * self._seconds_per_sequence, _LEAST), _MOST),
            )
        self.in_flight += sequences
        try:
            yield
        finally:
            self.in_flight -= sequences
            self._note_end(sequences)

    def _note_end(self, sequences: int) -> None:
        """Learns the pace at which sequences end, from the time between ends while there is a queue."""
        now = time.monotonic()
        if self._last_end is not None and self.in_flight > 0:
            pace = (now - self._last_end) / sequences
            self._seconds_per_sequence += _SMOOTHING * (pace - self._seconds_per_sequence)
        self._last_end = now
