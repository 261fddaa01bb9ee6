"""Replicas that come and go while the job runs: what the store says that it shall have, within a second."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from orchestrator_svc.grpo.rollouts.replicas import Replicas
from orchestrator_svc.jobs.context import JobContext, goes_on
from orchestrator_svc.jobs.workers import start_replica
from orchestrator_svc.jobstore.scaling import scale_of
from orchestrator_svc.launchers.base import WorkerPool
from surogate.errors import SurogateError

POLL_SECONDS = 1.0


class ReplicaScaling:
    """Follows the store. A new replica takes the current weights before it gets traffic; one that goes is drained."""

    def __init__(self, ctx: JobContext, pool: WorkerPool, replicas: Replicas) -> None:
        self._ctx = ctx
        self._pool = pool
        self._replicas = replicas
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to follow."""
        self._task = asyncio.create_task(self._follow(), name="replica scaling")

    async def close(self) -> None:
        """Stops following."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _follow(self) -> None:
        while True:
            rung = self._ctx.bell.event(self._ctx.job_id)
            try:
                await self._look()
            except SurogateError as error:
                await self._complain(error)
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await rung.wait()

    async def _look(self) -> None:
        wanted = await self._ctx.database.read(lambda c: scale_of(c, self._ctx.job_id))
        while wanted is not None and len(self._replicas.all) < wanted:
            index = len(self._replicas.all)
            self._replicas.add(await start_replica(self._ctx, self._pool, index))
            await self._ctx.notice(f"replica inference-{index} is added: {index + 1} of {wanted}", warning=False)
        while wanted is not None and len(self._replicas.all) > wanted:
            worker = await self._replicas.drain_last()
            await self._pool.remove(worker)
            left = len(self._replicas.all)
            await self._ctx.notice(f"replica {worker.name} is drained and gone: {left} are left", warning=False)

    async def _complain(self, error: SurogateError) -> None:
        self._ctx.log.warning("the replicas cannot be scaled as asked", error=str(error))
        if goes_on(error):  # the store is away: nothing was asked
            return
        with suppress(SurogateError):
            await self._ctx.set_status(f"the replicas cannot be scaled as asked: {error}")
