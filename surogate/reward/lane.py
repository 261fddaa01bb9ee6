"""An event loop in a thread of its own, for async scorers: one that blocks never stops the service from answering."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress

from surogate.errors import DeadlineError

SETTLE_SECONDS = 2.0
"""Time that a cancelled scorer has to end before it counts as hung."""


class AsyncCall:
    """One call on the lane; `alive` until it has really ended, cancelled or not.

    What it returns comes back as one message between the loops: the futures of `run_coroutine_threadsafe` take several,
    which weighs as much as a quick comparison of answers.
    """

    def __init__(self, make: Callable[[], Awaitable[object]], lane: asyncio.AbstractEventLoop) -> None:
        self._make = make
        self._lane = lane
        self._loop = asyncio.get_running_loop()
        self._result: asyncio.Future[object] = self._loop.create_future()
        self._ended: asyncio.Future[None] | None = None
        self._task: asyncio.Task[object] | None = None
        self.alive = True
        lane.call_soon_threadsafe(self._begin)

    async def result(self, seconds: float) -> object:
        """Waits for what it returns or raises. Raises DeadlineError after `seconds`, having cancelled it."""
        try:
            async with asyncio.timeout(seconds) as timeout:
                return await self._result
        except asyncio.CancelledError:
            self._lane.call_soon_threadsafe(self._cancel)
            raise
        except TimeoutError as error:
            if not timeout.expired():
                raise
            self._lane.call_soon_threadsafe(self._cancel)
            raise DeadlineError(f"scoring took longer than item_timeout ({seconds:g} s)") from error

    async def settled(self, seconds: float = SETTLE_SECONDS) -> bool:
        """Waits for a cancelled call to end; returns whether it did."""
        self._ended = self._loop.create_future()
        if not self.alive:
            return True
        try:
            async with asyncio.timeout(seconds):
                await self._ended
        except TimeoutError:
            return False
        return True

    def _begin(self) -> None:
        self._task = self._lane.create_task(self._main())
        self._task.add_done_callback(self._end)

    async def _main(self) -> object:
        return await self._make()

    def _cancel(self) -> None:
        if self._task is not None:  # as it is by now: what began it was put before this on the lane
            self._task.cancel()

    def _end(self, task: asyncio.Task[object]) -> None:
        self.alive = False
        with suppress(RuntimeError):  # the service's own loop is closed: then nobody waits
            self._loop.call_soon_threadsafe(self._tell, task)

    def _tell(self, task: asyncio.Task[object]) -> None:
        """Passes on how the task ended, in the loop that waits for it."""
        error = None if task.cancelled() else task.exception()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        if self._result.done():
            return
        if task.cancelled():
            self._result.cancel()
        elif error is not None:
            self._result.set_exception(error)
        else:
            self._result.set_result(task.result())


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
