"""An event loop in a thread of its own, for async scorers: one that blocks never stops the service from answering."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

from surogate.errors import DeadlineError

SETTLE_SECONDS = 2.0
"""Time that a cancelled scorer has to end before it counts as hung."""


class AsyncCall:
    """One call on the lane; `alive` until it has really ended, cancelled or not."""

    def __init__(self, make: Callable[[], Awaitable[object]], lane: asyncio.AbstractEventLoop) -> None:
        self._make = make
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.alive = True
        self._future = asyncio.run_coroutine_threadsafe(self._main(), lane)

    async def result(self, seconds: float) -> object:
        """Waits for what it returns or raises. Raises DeadlineError after `seconds`, having cancelled it."""
        try:
            async with asyncio.timeout(seconds) as timeout:
                return await asyncio.wrap_future(self._future)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise DeadlineError(f"scoring took longer than item_timeout ({seconds:g} s)") from error

    async def settled(self, seconds: float = SETTLE_SECONDS) -> bool:
        """Waits for a cancelled call to end; returns whether it did."""
        try:
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True

    async def _main(self) -> object:
        try:
            return await self._make()
        finally:
            self.alive = False
            # The service's own loop may be closed by now: then nobody waits.
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._ended.set)


class Lane:
    """Starts its thread with the first call. The thread is a daemon: it never delays the end of the process."""

    def __init__(self) -> None:
        self._lane: asyncio.AbstractEventLoop | None = None

    def call(self, make: Callable[[], Awaitable[object]]) -> AsyncCall:
        """Runs what `make` returns on the lane."""
        if self._lane is None:
            self._lane = asyncio.new_event_loop()
            threading.Thread(target=self._lane.run_forever, name="async-scoring", daemon=True).start()
        return AsyncCall(make, self._lane)

    def close(self) -> None:
        """Cancels what still runs and ends the thread."""
        if self._lane is not None:
            self._lane.call_soon_threadsafe(self._cancel_all)

    def _cancel_all(self) -> None:
        assert self._lane is not None
        tasks = asyncio.all_tasks(self._lane)
        for task in tasks:
            task.cancel()
        stop = self._lane.create_task(_after(tasks))
        stop.add_done_callback(lambda _: self._lane and self._lane.stop())


async def _after(tasks: set[asyncio.Task[object]]) -> None:
    if tasks:
        await asyncio.wait(tasks, timeout=SETTLE_SECONDS)
    await asyncio.sleep(0.1)  # the news of ended child processes is yet to come in
