"""The life of one job in one orchestrator: its context, its workers, its runner, its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.rpc import status_pb2
from sqlalchemy import Connection, Row

from orchestrator_svc import metrics
from orchestrator_svc.jobs.context import JobContext, goes_on
from orchestrator_svc.jobs.tracking_process import tracking
from orchestrator_svc.jobstore import store
from orchestrator_svc.jobstore.bell import Bell
from orchestrator_svc.jobstore.database import JOB_PATIENCE, Database
from orchestrator_svc.jobstore.journal import LeaseLostError, record
from orchestrator_svc.launchers.base import Launcher, WorkerPool
from surogate.config.job import resolve_job
from surogate.errors import CancelledError, InternalError, InvalidInputError, SurogateError
from surogate.rpc.status import to_status
from surogate.telemetry import log
from surogate.telemetry import metrics as telemetry
from surogate.v1 import job_pb2

RunJob = Callable[[JobContext, WorkerPool], Awaitable[None]]
"""A runner of one kind of job; `orchestrator_svc.jobs.context` says what it may do."""

_State = job_pb2.Job


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    state: job_pb2.Job.State.ValueType
    message: str
    error: status_pb2.Status | None = None


async def open_context(row: Row[Any], database: Database, owner: str, bell: Bell) -> JobContext | None:
    """What the runner of a claimed job gets; the job is STARTING then. None if it FAILED before it began."""
    try:
        config = await asyncio.to_thread(resolve_job, row.config)
        output_dir = Path(row.output_dir)
        await asyncio.to_thread(_make_folder, output_dir)
    except SurogateError as error:
        await _finish(database, bell, row.job_id, owner, _failed(error))
        return None
    resumed = row.start_time is not None
    ctx = JobContext(
        job_id=row.job_id,
        config=config,
        output_dir=output_dir,
        database=database,
        owner=owner,
        bell=bell,
        resumed=resumed,
        step=row.step,
        state=row.runner_state,
        labels=row.labels,
        uid=store.uid_of(row.job_id, row.create_time),
    )
    text = "starting its workers again" if resumed else "starting its workers"
    event = job_pb2.StateChanged(state=_State.STATE_STARTING, status_message=text)
    changes = {} if resumed else {"start_time": time.time()}

    def begin(connection: Connection) -> bool:
        """Whether the job may start: a cancellation may have come between the claim and now."""
        if store.get(connection, row.job_id).cancel_requested:
            return False
        record(connection, row.job_id, owner, [event], changes)
        return True

    if not await database.write(begin, patience=JOB_PATIENCE):
        await _finish(database, bell, row.job_id, owner, Outcome(_State.STATE_CANCELLED, "cancelled"))
        return None
    bell.ring(row.job_id)
    return ctx


async def run_job(ctx: JobContext, launcher: Launcher, run: RunJob, cancel_seconds: float) -> None:
    """Runs a job to its end, and writes the end down.

    Cancelled by asyncio, it stops the workers and leaves the job as it is in the store.
    """
    with log.bound(job=ctx.job_id):
        try:
            async with tracking(ctx) as tracked:
                outcome = await _outcome(ctx, launcher, run, cancel_seconds)
                tracked.how = _State.State.Name(outcome.state).removeprefix("STATE_")
        finally:
            telemetry.forget(ctx.job_id)
        if outcome.state != _State.STATE_SUCCEEDED:
            await launcher.reap(ctx.job_id, ctx.uid)
        state = _State.State.Name(outcome.state).removeprefix("STATE_")
        ctx.log.info("job ended", state=state, message=outcome.message)
        await _finish(ctx.database, ctx.bell, ctx.job_id, ctx.owner, outcome)
        metrics.JOB_ENDS.labels(ctx.config.kind, state).inc()


async def cancel_leftover(row: Row[Any], database: Database, launcher: Launcher, bell: Bell, owner: str) -> None:
    """Ends a job whose orchestrator died while it was being cancelled."""
    await launcher.reap(row.job_id, store.uid_of(row.job_id, row.create_time))
    await _finish(database, bell, row.job_id, owner, Outcome(_State.STATE_CANCELLED, "cancelled"))


async def _outcome(ctx: JobContext, launcher: Launcher, run: RunJob, cancel_seconds: float) -> Outcome:
    try:
        pool = await launcher.open(ctx)
        ctx.pool = pool
        try:
            await _run_or_cancel(ctx, pool, run, cancel_seconds)
        except BaseException as error:
            await (pool.release() if goes_on(error) else pool.stop())
            raise
        await pool.stop()
    except LeaseLostError:
        raise
    except SurogateError as error:
        if ctx.cancelled.is_set():
            return _cancelled(error)
        if goes_on(error):
            raise
        ctx.log.error("job failed", error=str(error), reason=error.reason)
        return _failed(error)
    except Exception as error:
        ctx.log.exception("job failed by a fault of the program")
        return _failed(InternalError(f"{type(error).__name__}: {error}"))
    if ctx.cancelled.is_set():
        return Outcome(_State.STATE_CANCELLED, "cancelled")
    return Outcome(_State.STATE_SUCCEEDED, "done")


async def _run_or_cancel(ctx: JobContext, pool: WorkerPool, run: RunJob, cancel_seconds: float) -> None:
    """Awaits the runner. After a cancellation it has time to save if it has begun to train, and none otherwise."""
    running = asyncio.ensure_future(run(ctx, pool))
    asked = asyncio.create_task(ctx.cancelled.wait())
    try:
        await asyncio.wait({running, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done() and ctx.is_training:
            await asyncio.wait({running}, timeout=cancel_seconds)
        if not running.done():
            running.cancel()
            await asyncio.wait({running})
        if running.cancelled():
            raise CancelledError("cancelled")
        running.result()
    finally:
        asked.cancel()
        if not running.done():
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def _finish(database: Database, bell: Bell, job_id: str, owner: str, outcome: Outcome) -> None:
    def end(connection: Connection) -> None:
        store.end(connection, job_id, owner, outcome.state, outcome.message, outcome.error)

    await database.write(end, patience=JOB_PATIENCE)
    bell.ring(job_id)


def _failed(error: SurogateError) -> Outcome:
    return Outcome(_State.STATE_FAILED, error.message, to_status(error))


def _cancelled(error: SurogateError) -> Outcome:
    detail = "" if isinstance(error, CancelledError) else f"; while stopping: {error.message}"
    return Outcome(_State.STATE_CANCELLED, f"cancelled{detail}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"output_dir: cannot make {folder}: {error.strerror}") from error
