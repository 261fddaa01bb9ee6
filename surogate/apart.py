"""Work that may take minutes and cannot be stopped - downloads, imports -, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")


async def apart(work: Callable[[], T]) -> T:
    """The result of `work()`, which runs in a daemon thread that is nobody else's.

    The threads of `asyncio.to_thread` are few: what hangs there keeps short work waiting, and the process from ending.
    A caller who is cancelled leaves this thread to itself, and it ends with the process.
    """
    loop, context = asyncio.get_running_loop(), copy_context()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if outcome.cancelled():
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)  # type: ignore[arg-type]  # None only where that is the result

    def run() -> None:
        try:
            result, failure = context.run(work), None
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            result, failure = None, error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="apart", daemon=True).start()
    return await outcome
