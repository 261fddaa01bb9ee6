"""Things that are kept under a key for a bounded time, and a bounded number of them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """The oldest goes first. For one thread, or one event loop."""

    def __init__(
        self, *, seconds: float = 2 * 3600, most: int = 20_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`seconds`: how long a thing is kept after it was put here or asked for last."""
        self._seconds = seconds
        self._most = most
        self._clock = clock
        self._items: OrderedDict[str, tuple[float, T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, key: str, item: T) -> None:
        """Keeps a thing, and forgets what is too old or too much."""
        now = self._clock()
        self._items[key] = (now, item)
        self._items.move_to_end(key)
        while len(self._items) > self._most or next(iter(self._items.values()))[0] < now - self._seconds:
            self._items.popitem(last=False)

    def get(self, key: str) -> T | None:
        """A thing, if it is still here; its time begins anew."""
        found = self.pop(key)
        if found is not None:
            self.put(key, found)
        return found

    def pop(self, key: str) -> T | None:
        """A thing, if it is still here; it is not kept any longer."""
        since, item = self._items.pop(key, (0.0, None))
        return item if item is not None and since >= self._clock() - self._seconds else None
