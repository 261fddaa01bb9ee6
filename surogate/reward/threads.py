"""Threads that score groups, each item with its own time; one that hangs in an item is given up, not waited for."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from surogate.telemetry.log import get_logger

Call = Callable[[], Any]

_log = get_logger("reward")


class Run:
    """Calls that a thread makes, one after the other, until it is done or abandoned."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        self._lock = threading.Lock()
        self._results: list[object] = []
        self._item_started = time.monotonic()
        self._is_abandoned = False
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Event()
        self._alive = True

    @property
    def alive(self) -> bool:
        """Whether a thread still makes its calls, or will."""
        return self._alive

    @property
    def results(self) -> list[object]:
        """What the calls returned or raised so far, in order."""
        with self._lock:
            return list(self._results)

    async def wait(self, seconds: float) -> bool:
        """Waits for the calls to end; returns whether they did."""
        try:
            async with asyncio.timeout(max(seconds, 0.001)):
                await self._done.wait()
        except TimeoutError:
            return False
        return True

    def seconds_left(self, item_timeout: float) -> float:
        """Seconds until the current item is late."""
        with self._lock:
            return self._item_started + item_timeout - time.monotonic()

    def abandon(self) -> None:
        """Has the thread stop after its current item."""
        with self._lock:
            self._is_abandoned = True

    def abandon_if_late(self, item_timeout: float) -> list[object] | None:
        """Abandons the thread if its current item is late; returns the results before that item, else None."""
        with self._lock:
            finished = len(self._results) == len(self._calls)
            if finished or time.monotonic() - self._item_started < item_timeout:
                return None
            self._is_abandoned = True
            return list(self._results)

    def make(self) -> None:
        """Makes the calls, in the thread that this is called in."""
        try:
            self._make()
        finally:
            self._alive = False

    def _make(self) -> None:
        with self._lock:
            self._item_started = time.monotonic()
        for call in self._calls:
            result = _made(call)
            with self._lock:
                if self._is_abandoned:
                    return
                self._results.append(result)
                self._item_started = time.monotonic()
        try:
            self._loop.call_soon_threadsafe(self._done.set)
        except RuntimeError:
            _log.debug("the service stopped while a group was scored")


class Threads:
    """Threads that are kept for the next run: starting one takes longer than a quick reward. There are as many as runs
    were ever made at once, hung ones included, which whoever abandons runs must bound."""

    def __init__(self) -> None:
        self._runs: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._free = 0
        self._count = 0

    def start(self, calls: Sequence[Call]) -> Run:
        """Has a thread make the calls, from now on."""
        run = Run(calls)
        with self._lock:
            if self._free:
                self._free -= 1
            else:
                self._count += 1
                threading.Thread(target=self._work, name="scoring", daemon=True).start()
        self._runs.put(run)
        return run

    def close(self) -> None:
        """Ends the threads that do not hang."""
        for _ in range(self._count):
            self._runs.put(None)

    def _work(self) -> None:
        while (run := self._runs.get()) is not None:
            run.make()
            with self._lock:
                self._free += 1


def _made(call: Call) -> object:
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - the scorer's; `outcome_of` names it
        return error
