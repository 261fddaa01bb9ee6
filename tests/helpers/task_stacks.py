"""Where asyncio's tasks wait: what a test's report says of them when it has failed or has taken too long.

pytest-timeout shows the stacks of threads alone, and a thread that runs an event loop always waits in `select`.
"""

from __future__ import annotations

import asyncio
import linecache
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

MOST_TASKS = 50


def waiting_tasks() -> str:
    """The tasks of this thread's event loop that have not ended, each with the lines at which it waits, outermost
    first; empty where there is no loop."""
    loop = _loop()
    tasks = [] if loop is None or loop.is_closed() else sorted(asyncio.all_tasks(loop), key=asyncio.Task.get_name)
    told = "\n".join("\n".join(_told(task)) for task in tasks[:MOST_TASKS])
    return told + (f"\nand {len(tasks) - MOST_TASKS} more tasks" if len(tasks) > MOST_TASKS else "")


def _loop() -> asyncio.AbstractEventLoop | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return asyncio.get_event_loop()
    except RuntimeError:
        return None


def _told(task: asyncio.Task[Any]) -> Iterator[str]:
    yield f"{task.get_name()}: {getattr(task.get_coro(), '__qualname__', task.get_coro())}"
    for awaited in _chain(task.get_coro()):
        frame = _frame(awaited)
        if frame is not None:
            name, line = frame.f_code.co_filename, frame.f_lineno
            yield f"  {name}:{line}: {linecache.getline(name, line or 0).strip()}"


def _chain(awaitable: Any) -> Iterator[Any]:
    """A coroutine, what it awaits, what that awaits, and so on."""
    while awaitable is not None:
        yield awaitable
        names = ("cr_await", "ag_await", "gi_yieldfrom")
        awaitable = next((getattr(awaitable, name) for name in names if hasattr(awaitable, name)), None)


def _frame(awaited: Any) -> FrameType | None:
    return next((getattr(awaited, f) for f in ("cr_frame", "ag_frame", "gi_frame") if hasattr(awaited, f)), None)
