"""Generation that runs ahead of training: a batch may be begun as soon as the policy it may be sampled from serves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from orchestrator_svc.grpo.batch import Batch
from orchestrator_svc.grpo.tasks import stop


class Ahead:
    """Batches in the making, by step. There are never more than were allowed by `open`."""

    def __init__(self, collect: Callable[[int], Awaitable[Batch]], *, first: int, last: int) -> None:
        """`first` is the step to begin with, `last` the last one of the job."""
        self._collect = collect
        self._next = first
        self._last = last
        self._tasks: dict[int, asyncio.Task[Batch]] = {}

    def open(self, step: int) -> None:
        """Allows the batches of steps up to `step` to be begun."""
        while self._next <= min(step, self._last):
            self._tasks[self._next] = self._start(self._next)
            self._next += 1

    async def take(self, step: int) -> Batch:
        """The batch of a step, which must have been allowed."""
        return await self._tasks.pop(step)

    async def pause(self) -> None:
        """Gives up the batches that are not complete; `resume` makes them anew."""
        await stop(self._tasks.values())

    def resume(self) -> None:
        """Begins again with what `pause` gave up."""
        for step, task in self._tasks.items():
            if task.cancelled():
                self._tasks[step] = self._start(step)

    async def close(self) -> None:
        """Stops what is in the making."""
        await stop(self._tasks.values())

    def _start(self, step: int) -> asyncio.Task[Batch]:
        return asyncio.create_task(self._begin(step), name=f"batch {step}")

    async def _begin(self, step: int) -> Batch:
        return await self._collect(step)
