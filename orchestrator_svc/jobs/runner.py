"""Runs jobs from the store: claims them under a lease, gives them workers, and writes down how they end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, Row

from orchestrator_svc import metrics
from orchestrator_svc.jobs.context import JobContext
from orchestrator_svc.jobs.job_life import RunJob, cancel_leftover, open_context, run_job
from orchestrator_svc.jobstore import leases, store
from orchestrator_svc.jobstore.bell import Bell
from orchestrator_svc.jobstore.database import Database
from orchestrator_svc.jobstore.identity import make_identity
from orchestrator_svc.launchers.base import Launcher, Run, WorkerPool
from orchestrator_svc.settings import OrchestratorSettings
from surogate.errors import SurogateError
from surogate.telemetry.log import get_logger

SWEEP_SECONDS = 60.0
_log = get_logger("orchestrator")


class JobRunner:
    """The queue of one orchestrator. `start` it, `wake` it when a job was made, `stop` it before the process ends."""

    def __init__(
        self,
        settings: OrchestratorSettings,
        database: Database,
        launcher: Launcher,
        runs: Mapping[str, RunJob],
        bell: Bell,
        identity: str | None = None,
    ) -> None:
        self._settings = settings
        self._database = database
        self._launcher = launcher
        self._runs = runs
        self._bell = bell
        self.identity = identity or make_identity()
        self._running: dict[str, tuple[JobContext, asyncio.Task[None]]] = {}
        self._woken = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def running(self) -> list[str]:
        """Ids of the jobs that run now."""
        return list(self._running)

    def pool_of(self, job_id: str) -> WorkerPool | None:
        """The workers of a job, if it runs here."""
        return self._running[job_id][0].pool if job_id in self._running else None

    def start(self) -> None:
        """Begins to take jobs, first of all those that a killed orchestrator left."""
        self._tasks = [
            asyncio.create_task(self._forever(self._take_jobs), name="take-jobs"),
            asyncio.create_task(self._forever(self._keep_leases), name="keep-leases"),
            asyncio.create_task(self._sweep(), name="sweep"),
        ]

    def wake(self) -> None:
        """Looks for jobs to run now rather than soon."""
        self._woken.set()

    def cancel(self, job_id: str) -> None:
        """Tells a job that it is to stop, if it runs here. One that runs elsewhere learns it from the store."""
        if job_id in self._running:
            self._running[job_id][0].mark_cancelling()

    async def stop(self) -> None:
        """Stops the jobs' workers and leaves the jobs as they are, for the next orchestrator to go on with."""
        await _cancel(self._tasks[:1])
        await _cancel([task for _, task in self._running.values()])
        await _cancel(self._tasks)
        try:
            await self._database.write(lambda c: leases.release(c, self.identity))
        except SurogateError as error:  # they run out by themselves
            _log.warning("the leases of jobs could not be given back", error=str(error))
        self._bell.ring_all()

    async def _forever(self, once: Callable[[], Awaitable[None]]) -> None:
        """Repeats `once` at a third of the lease, and when woken; a store that does not answer is tried again."""
        while True:
            try:
                await once()
            except SurogateError as error:
                _log.error("the store failed; trying again", error=str(error))
                await asyncio.sleep(1.0)
            await self._pause(woken=once == self._take_jobs)

    async def _sweep(self) -> None:
        """Has the launcher free, now and then, what ended jobs may have left behind."""
        while True:
            try:
                await self._launcher.sweep(self._known)
            except SurogateError as error:
                _log.warning("cannot look for what ended jobs have left", error=str(error))
            await asyncio.sleep(SWEEP_SECONDS)

    async def _known(self, job_ids: Collection[str]) -> Mapping[Run, bool]:
        return await self._database.read(lambda c: store.known_runs(c, job_ids))

    async def _pause(self, woken: bool) -> None:
        seconds = self._settings.lease_seconds / 3
        if not woken:
            await asyncio.sleep(seconds)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        self._woken.clear()

    async def _take_jobs(self) -> None:
        while len(self._running) < self._settings.max_running_jobs:
            row = await self._database.write(self._claim)
            if row is None:
                return
            if row.cancel_requested:
                await cancel_leftover(row, self._database, self._launcher, self._bell, self.identity)
            else:
                await self._begin(row)

    def _claim(self, connection: Connection) -> Row[Any] | None:
        return leases.claim_next(connection, self.identity, self._settings.lease_seconds, running=self._running)

    async def _begin(self, row: Row[Any]) -> None:
        ctx = await open_context(row, self._database, self.identity, self._bell)
        if ctx is None:
            return
        kind = ctx.config.kind
        work = run_job(ctx, self._launcher, self._runs[kind], self._settings.cancel_seconds)
        task = asyncio.create_task(work, name=f"job-{row.job_id}")
        self._running[row.job_id] = (ctx, task)
        task.add_done_callback(lambda done: self._ended(row.job_id, done))

    def _ended(self, job_id: str, task: asyncio.Task[None]) -> None:
        self._running.pop(job_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The store could not be told how it ended. It is taken up again, not at once: what failed may fail again.
            _log.error("a job was let go of", job=job_id, error=str(error))
            return
        self.wake()

    async def _keep_leases(self) -> None:
        """Counts jobs and renews leases; lets go of jobs that were lost; passes on cancellations found in the store."""
        seconds = self._settings.lease_seconds
        counts = await self._database.read(store.count_by_state)
        for state, count in counts.items():
            metrics.JOBS.labels(state).set(count)
        running = dict(self._running)  # a job that is claimed while the store is asked is not in its answer
        held = await self._database.write(lambda c: leases.renew(c, self.identity, seconds))
        for job_id, (ctx, task) in running.items():
            if job_id not in held:
                if not task.done():
                    task.cancel("its lease was lost")
            elif held[job_id] and not ctx.cancelled.is_set():
                ctx.mark_cancelling()


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
