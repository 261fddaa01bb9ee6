"""Reading ahead: the data of coming steps is read by threads while a step trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

_ON_A_GPU = 2
"""Threads where the training itself computes elsewhere. On a CPU they would only take its cores."""


class ReadAhead(Generic[T]):
    """What `read(step)` gives, for steps that are asked for one after the other; `threads` of them read ahead.

    `read` must give the same for the same step, and be safe to call from several threads at once.
    """

    def __init__(self, read: Callable[[int], T], *, end: int, threads: int) -> None:
        """Steps from `end` on are never read."""
        self._read = read
        self._end = end
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") if threads else None
        self._coming: dict[int, Future[T]] = {}

    def of(self, step: int) -> T:
        """The data of a step. Raises what reading it raises."""
        if self._pool is None:
            return self._read(step)
        for ahead in range(step, min(step + self._threads + 1, self._end)):
            if ahead not in self._coming:
                self._coming[ahead] = self._pool.submit(self._read, ahead)
        found = self._coming.pop(step, None)
        return found.result() if found is not None else self._read(step)

    def close(self) -> None:
        """Gives up what is being read."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def num_threads(wanted: int | str, device: torch.device) -> int:
    """Threads for `dataloader_num_workers`: a number, or "auto"."""
    if wanted == "auto":
        return 0 if device.type == "cpu" else _ON_A_GPU
    return int(wanted)
