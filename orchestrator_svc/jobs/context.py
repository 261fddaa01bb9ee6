"""What a runner of a job is given: the configuration, the folder, and a way to tell what happens.

A runner is `async def run(ctx: JobContext, pool: WorkerPool) -> None`:

- it returns: the job SUCCEEDED;
- it raises a `SurogateError`: the job FAILED with it;
- `ctx.cancelled` is set: it saves what it can and returns or raises `surogate.errors.CancelledError`: the job is
  CANCELLED;
- it is cancelled by asyncio (the orchestrator shuts down): it may save briefly in `finally`; the job stays RUNNING in
  the store and is run again, with `ctx.resumed` true, by the next orchestrator, as it is after a kill.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator_svc.jobs.eta import Eta
from orchestrator_svc.jobstore import store
from orchestrator_svc.jobstore.bell import Bell
from orchestrator_svc.jobstore.database import JOB_PATIENCE, StoreUnavailableError
from orchestrator_svc.jobstore.journal import Happening, LeaseLostError, record
from orchestrator_svc.jobstore.restarts import add_restart, recent_restarts
from surogate.errors import UnavailableError
from surogate.telemetry import metrics
from surogate.telemetry.log import get_logger
from surogate.v1 import job_pb2

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from orchestrator_svc.jobstore.database import Database
    from orchestrator_svc.launchers.base import WorkerPool
    from surogate.config.job import AnyJob


def goes_on(error: BaseException | None) -> bool:
    """Whether a job that met this will be gone on with, by the next orchestrator or when the store is back."""
    if isinstance(error, UnavailableError):
        return error.reason == StoreUnavailableError.reason
    return isinstance(error, asyncio.CancelledError | LeaseLostError)


WRITING_MODEL = "writing the final model"


class JobContext:
    """One run of one job by this orchestrator.

    Attributes:
        job_id: Id, also the trainer session's.
        config: The resolved job (`surogate.config.job`): `.kind`, `.train`, for GRPO also `.infer` and `.orch`.
        output_dir: Absolute folder of the job; exists.
        database: The store, for tables of one's own that join `orchestrator_svc.jobstore.schema.metadata`.
        cancelled: Set when somebody asked the job to stop.
        resumed: Whether the job ran before, in this orchestrator or one that was killed.
        step: Optimiser steps that had been recorded when this run began.
        state: What the runner stored by `update(state=…)`, as of the last store.
        log: Logger that puts the job on every line.
        pool: The job's workers, once opened: what GetJob shows of them.
        owner: The orchestrator that must hold the job's lease for a write to be done.
        bell: Wakes those who watch the job.
        uid: Tells the job from an earlier one of the same id.
        labels: Labels that its author gave it.
    """

    def __init__(
        self,
        *,
        job_id: str,
        config: AnyJob,
        output_dir: Path,
        database: Database,
        owner: str,
        bell: Bell | None = None,
        resumed: bool = False,
        step: int = 0,
        state: Mapping[str, Any] | None = None,
        uid: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.job_id = job_id
        self.labels = dict(labels or {})
        self.uid = uid
        self.config = config
        self.output_dir = output_dir
        self.database = database
        self.cancelled = asyncio.Event()
        self.resumed = resumed
        self.step = step
        self.state: dict[str, Any] = dict(state or {})
        self.log = get_logger("orchestrator").bind(job=job_id)
        self.pool: WorkerPool | None = None
        self.owner = owner
        self.bell = bell or Bell()
        self._eta = Eta()
        self._status = ""
        self._doing = ""
        self._stall = ""
        self._began = False
        self._state = job_pb2.Job.STATE_STARTING

    async def emit(
        self,
        *happenings: Happening,
        state: Mapping[str, Any] | None = None,
        also: Callable[[Connection], None] | None = None,
    ) -> None:
        """Appends events to the job's history and brings the job up to date with them, in one transaction.

        StepCompleted sets step, max_steps, metrics and the ETA; CheckpointSaved the checkpoint; WeightsPushed the
        policy version; EvaluationCompleted the metrics `eval/<environment>/<name>`.

        Args:
            happenings: `job_pb2` messages: StepCompleted, CheckpointSaved, EvaluationCompleted, WeightsPushed, Notice,
                SamplesShown.
            state: Replaces `self.state`, in the same transaction.
            also: `also(connection)` is run in the same transaction: a ledger row and its event are both kept or
                neither is.

        Raises:
            LeaseLostError: Another orchestrator has taken the job over; let it propagate.
        """
        changes: dict[str, Any] = {}
        for happening in happenings:
            if isinstance(happening, job_pb2.StepCompleted) and not happening.replayed:
                changes["eta_seconds"] = self._eta.observe(happening.step, happening.max_steps)
        await self._record(happenings, changes, state, also)

    async def update(
        self,
        *,
        step: int | None = None,
        max_steps: int | None = None,
        metrics: Mapping[str, float] | None = None,
        policy_version: int | None = None,
        checkpoint: str | Path | None = None,
        state: Mapping[str, Any] | None = None,
        also: Callable[[Connection], None] | None = None,
    ) -> None:
        """Changes what GetJob shows, without an event. Metrics are merged; what is None stays.

        The rest is as for `emit`.
        """
        given = {
            "step": step,
            "max_steps": max_steps,
            "metrics": metrics,
            "policy_version": policy_version,
            "checkpoint": None if checkpoint is None else str(checkpoint),
        }
        await self._record((), {name: value for name, value in given.items() if value is not None}, state, also)

    async def set_status(self, text: str) -> None:
        """Says in a sentence where the job is ("waiting for 2 inference replicas"); the same again is not repeated."""
        if text == self._status:
            return
        self._status = text
        self.log.info(text)
        await self._record((job_pb2.StateChanged(state=self._state, status_message=text),), {}, None, None)

    async def running(self, text: str = "training") -> None:
        """Says what is being done: the job goes from STARTING to RUNNING. Idempotent. A stall is said before it."""
        self._doing = text
        if not self._began:
            metrics.begin(self.job_id)
        self._began = True
        if self._state == job_pb2.Job.STATE_STARTING:
            self._state = job_pb2.Job.STATE_RUNNING
            self._status = ""
        await self.set_status(self._stall or text)

    async def stalled(self, text: str) -> None:
        """Says what the job waits for while it cannot go on; how long it still takes is not known then."""
        self._stall = text
        self._eta.interrupt()
        await self._record((), {"eta_seconds": None}, None, None)
        await self.set_status(text)

    async def goes_on(self) -> None:
        """The stall is over: says again what is being done."""
        self._stall = ""
        await self.running(self._doing)

    async def notice(self, text: str, *, component: str = "orchestrator", warning: bool = True) -> None:
        """Tells something that a person should read, in the job's history and in the log."""
        (self.log.warning if warning else self.log.info)(text, about=component)
        severity = job_pb2.Notice.SEVERITY_WARNING if warning else job_pb2.Notice.SEVERITY_INFO
        await self.emit(job_pb2.Notice(severity=severity, component=component, text=text))

    async def has_ended(self, uid: str) -> bool:
        """Whether the store knows an earlier job of the same id by that uid, and that it has ended or was deleted."""
        known = await self.database.read(lambda c: store.known_runs(c, [self.job_id]), patience=JOB_PATIENCE)
        return known.get((self.job_id, uid), False)

    async def recent_restarts(self, worker: str, since: float) -> list[float]:
        """When a worker was started again after `since`, by any orchestrator, in seconds since the epoch."""
        return await self.database.read(lambda c: recent_restarts(c, self.job_id, worker, since))

    async def add_restart(self, worker: str, when: float, since: float) -> None:
        """Writes down that a worker is started again; what was before `since` is forgotten."""
        await self.update(also=lambda c: add_restart(c, self.job_id, worker, when, since))

    @property
    def is_training(self) -> bool:
        """Whether there may be something to save."""
        return self._began

    def mark_cancelling(self) -> None:
        """Tells the runner that somebody asked the job to stop."""
        self._state = job_pb2.Job.STATE_CANCELLING
        self.cancelled.set()

    async def _record(
        self,
        happenings: tuple[Happening, ...],
        changes: dict[str, Any],
        state: Mapping[str, Any] | None,
        also: Callable[[Connection], None] | None,
    ) -> None:
        if state is not None:
            changes["runner_state"] = dict(state)
        if self.pool is not None:
            changes["workers"] = [_describe(worker) for worker in self.pool.workers]
        await self.database.write(
            lambda c: record(c, self.job_id, self.owner, happenings, changes, also), patience=JOB_PATIENCE
        )
        if state is not None:
            self.state = dict(state)
        self.bell.ring(self.job_id)


def _describe(worker: Any) -> dict[str, Any]:
    return {
        "component": worker.component,
        "index": worker.index,
        "address": worker.address,
        "restarts": worker.restarts,
        "policy_version": worker.policy_version,
        "status_message": worker.status_message,
    }
