"""Standard output: tables, and text of others."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Iterable
from typing import Any

from rich.console import Console
from rich.progress import track

from surogate.visible import visible

_UNFOLDED = 10_000
"""Columns, more than any line needs."""


def standard_output() -> Console:
    """A console without colours for numbers; in a file or a pipe nothing is folded: a path stays in one piece."""
    return Console(width=None if sys.stdout.isatty() else _UNFOLDED, highlight=False)


async def all_shown(what: str, work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Does it all at once, with a bar on a terminal; the first failure ends the rest."""
    tasks = [asyncio.create_task(item) for item in work]
    try:
        for task in track(tasks, what, console=Console(stderr=True), disable=not sys.stderr.isatty()):
            await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def write_foreign(text: str) -> None:
    """Writes at once text that a model or a worker has made: as it is, but to a terminal what would steer it is spelled
    out."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
