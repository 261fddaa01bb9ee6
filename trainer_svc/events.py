"""A session's history: bounded, numbered, and watched by any number of readers."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator

from surogate.errors import OutOfRangeError
from surogate.v1 import trainer_pb2 as trainer

MAX_EVENTS = 10_000
"""Events kept; older ones are forgotten first."""

_BATCH = 256
"""Events sent before others get their turn."""


class EventLog:
    """Events in order, numbered from 1. Belongs to one event loop."""

    def __init__(self, max_events: int = MAX_EVENTS) -> None:
        self._events: deque[trainer.SessionEvent] = deque(maxlen=max_events)
        self._last = 0
        self._closed = False
        self._changed = asyncio.Event()

    def add(self, event: trainer.SessionEvent) -> None:
        """Numbers and dates an event and wakes those who watch."""
        self._last += 1
        event.sequence = self._last
        event.time.GetCurrentTime()
        self._events.append(event)
        self._wake()

    def close(self) -> None:
        """Ends the history: watchers get what is left and then end."""
        self._closed = True
        self._wake()

    async def watch(self, after: int) -> AsyncIterator[trainer.SessionEvent]:
        """Yields events with a sequence greater than `after`, those to come too, until the log is closed.

        Starts at the oldest event kept if those before it are forgotten. Raises OutOfRangeError if `after` is in the
        future: it was another process that counted so far.
        """
        if after > self._last:
            raise OutOfRangeError(
                f"after_sequence is {after}, and the session has had {self._last} events since this trainer started; "
                "watch from 0",
                reason="SEQUENCE_AHEAD",
            )
        while True:
            changed = self._changed
            for event in self._after(after):
                yield event
                after = event.sequence
            if after < self._last:
                continue
            if self._closed:
                return
            await changed.wait()

    def _after(self, sequence: int) -> list[trainer.SessionEvent]:
        oldest = self._last - len(self._events)
        begin = max(sequence - oldest, 0)
        return list(itertools.islice(self._events, begin, begin + _BATCH))

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
