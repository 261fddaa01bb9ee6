"""Launchers for tests of what is above them."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator_svc.jobs.context import JobContext
from orchestrator_svc.launchers.base import Component, Launcher, Worker, WorkerPool, WorkerSpec
from surogate.errors import FailedPreconditionError


class EmptyPool(WorkerPool):
    """A pool for jobs that need no workers."""

    @property
    def workers(self) -> Sequence[Worker]:
        return ()

    def count(self, component: Component, wanted: int) -> int:
        return wanted

    async def start(self, spec: WorkerSpec) -> Worker:
        raise FailedPreconditionError("there are no workers here")

    async def stop(self) -> None:
        """Nothing to stop."""


class EmptyLauncher(Launcher):
    """Gives each job an empty pool; remembers which jobs were reaped."""

    def __init__(self) -> None:
        self.reaped: list[str] = []

    async def open(self, job: JobContext) -> WorkerPool:
        return EmptyPool()

    async def reap(self, job_id: str, uid: str) -> None:
        self.reaped.append(job_id)
