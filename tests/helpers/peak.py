"""How much memory a block of code takes at its highest, for programs that tests start."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Rise:
    """Bytes above what the process held before, at the highest."""

    size: int = 0


def anonymous() -> int:
    """Bytes of memory that is not a file's: files are mapped, and what is mapped may be dropped at any time."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@contextmanager
def rise() -> Iterator[Rise]:
    """Watches the block every millisecond. The result is there after it."""
    found, before, done = Rise(), anonymous(), threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            found.size = max(found.size, anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
