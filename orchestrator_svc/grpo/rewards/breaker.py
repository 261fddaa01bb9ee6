"""A circuit breaker: while a service fails, one caller at a time finds out whether it is back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from surogate.errors import UnavailableError

TRIPS_AFTER = 3
"""Failures in a row after which callers wait for each other."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds between attempts: doubled with each failure."""


class Breaker:
    """Counts the failures of one service. An attempt is made inside `attempt()` and reported by one of the others."""

    def __init__(self) -> None:
        self._failures = 0
        self._pause = FIRST_PAUSE
        self._again_at = 0.0
        self._probing = asyncio.Lock()

    @property
    def is_open(self) -> bool:
        """Whether callers wait for each other."""
        return self._failures >= TRIPS_AFTER

    @asynccontextmanager
    async def attempt(self, give_up: float) -> AsyncIterator[None]:
        """The turn of a caller, who has time until `give_up` (of `time.monotonic`).

        Raises:
            UnavailableError: The service did not come back in that time.
        """
        if not self.is_open:
            await self._wait(give_up)
            yield
            return
        async with self._probing:
            await self._wait(give_up)
            yield

    def succeeded(self) -> None:
        """The service answered."""
        self._failures, self._pause, self._again_at = 0, FIRST_PAUSE, 0.0

    def failed(self) -> None:
        """The service could not be reached."""
        self._failures += 1
        self._again_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    async def _wait(self, give_up: float) -> None:
        if max(self._again_at, time.monotonic()) > give_up:
            raise UnavailableError(f"it did not answer {self._failures} times in a row", reason="SERVICE_AWAY")
        await asyncio.sleep(max(0.0, self._again_at - time.monotonic()))
