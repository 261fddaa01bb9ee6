"""PT and SFT jobs: one trainer session that runs by itself, followed to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from orchestrator_svc.jobs.context import JobContext
from orchestrator_svc.jobs.session_record import Origin, SessionRecord
from orchestrator_svc.jobs.session_stream import EventBatches
from orchestrator_svc.jobs.workers import start_workers
from orchestrator_svc.jobstore.database import StoreUnavailableError
from orchestrator_svc.launchers.base import Worker, WorkerPool
from surogate.errors import (
    CancelledError,
    FailedPreconditionError,
    NotFoundError,
    SurogateError,
    UnavailableError,
)
from surogate.rpc.status import from_status
from surogate.structs import to_struct
from surogate.v1 import trainer_pb2, trainer_pb2_grpc

MAX_RECOVERIES = 3
"""Times that training is taken up again without a step of progress between them."""

_RECOVERY_PAUSE = 0.5
_OCCUPIED_PAUSE = 2.0
_STOP_SECONDS = 180.0
_CLEAN_UP_SECONDS = 10.0
_RECOVERABLE = frozenset({"WORKER_DIED", "WORKER_HUNG", "SEQUENCE_AHEAD", "NO_SUCH_SESSION"})

_CHECKPOINT_LOST = "CHECKPOINT_DAMAGED"

T = TypeVar("T")
_State = trainer_pb2.Session
_ENDED = frozenset({_State.STATE_SUCCEEDED, _State.STATE_FAILED, _State.STATE_STOPPED})


async def run(ctx: JobContext, pool: WorkerPool) -> None:
    """Trains as configured; see `orchestrator_svc.jobs.context` for what a runner may do."""
    workers = await start_workers(ctx, pool)
    job = TrainingJob(ctx, workers.trainer)
    try:
        await job.run()
    except asyncio.CancelledError:
        if pool.ends_workers:
            await job.save()
        raise


class TrainingJob:
    """Follows a session through all incarnations of the trainer."""

    def __init__(self, ctx: JobContext, trainer: Worker) -> None:
        self._ctx = ctx
        self._trainer = trainer
        self._record = SessionRecord(ctx)
        self._origin = Origin()

    async def run(self) -> None:
        """Returns when the final model is written. Raises what the session failed with, or CancelledError."""
        attempts = 0
        while True:
            progress = self._record.step
            try:
                session = await self._follow()
                self._raise_failure(session)
                break
            except SurogateError as error:
                if self._ctx.cancelled.is_set() or not (_recoverable(error) or self._lost_checkpoint(error)):
                    raise
                attempts = 1 if self._record.step > progress else attempts + 1
                if attempts > MAX_RECOVERIES:
                    raise
                await self._ctx.notice(f"training is taken up again: {_first_line(error)}", component="trainer")
            await asyncio.sleep(_RECOVERY_PAUSE)
        await self._record.finish()
        await self._forget_session()

    def _lost_checkpoint(self, error: SurogateError) -> bool:
        """Whether the session failed since the checkpoint that it was to begin from is not there, or is damaged."""
        return error.reason == _CHECKPOINT_LOST and self._record.lose(self._origin)

    async def save(self) -> None:
        """Has the session save and end, and writes down what it still reports. For an orchestrator that shuts down."""
        if self._trainer.address and self._ctx.is_training:
            with suppress(SurogateError, TimeoutError):
                async with asyncio.timeout(_STOP_SECONDS):
                    await self._save()

    async def _save(self) -> None:
        stub = await self._stub()
        watched = trainer_pb2.WatchSessionRequest(session_id=self._ctx.job_id, after_sequence=self._record.sequence)
        deleted = trainer_pb2.DeleteSessionRequest(session_id=self._ctx.job_id)
        async with EventBatches(stub.WatchSession(watched)) as batches:
            deleting = asyncio.ensure_future(stub.DeleteSession(deleted, timeout=_STOP_SECONDS))
            async for batch in batches:
                await self._record.write(batch)
            await deleting

    async def _follow(self) -> trainer_pb2.Session:
        """Opens the session, or finds it, and follows it to its end or to the trainer's."""
        await self._ctx.set_status("waiting for the trainer")
        await self._trainer.ready()
        stub = await self._stub()
        session = await self._open(stub)
        await self._record.attach(session)
        if session.state == _State.STATE_READY:
            session = await stub.StartSession(trainer_pb2.StartSessionRequest(session_id=self._ctx.job_id))
        if session.state == _State.STATE_RUNNING:
            await self._ctx.running()
        request = trainer_pb2.WatchSessionRequest(session_id=self._ctx.job_id, after_sequence=self._record.sequence)
        async with EventBatches(stub.WatchSession(request)) as batches:
            stopping = asyncio.create_task(self._stop_when_cancelled(stub))
            try:
                async for batch in batches:
                    newest: trainer_pb2.Session | None = await _uncancelled(self._take(stub, batch))
                    if newest is not None and newest.state in _ENDED:
                        return newest
            finally:
                stopping.cancel()
                with suppress(asyncio.CancelledError):
                    await stopping
        if session.state in _ENDED:  # while no orchestrator followed it; all that it told has been written down
            return session
        raise UnavailableError("the trainer ended the session's event stream")

    async def _take(self, stub: Any, batch: list[trainer_pb2.SessionEvent]) -> trainer_pb2.Session | None:
        """Acts on events and writes them down; returns the newest state of the session among them."""
        session: trainer_pb2.Session | None = None
        for event in batch:
            if event.WhichOneof("event") == "session":
                session = event.session
                await self._on_state(stub, session)
        await self._record.write(batch)
        ending = self._record.ending(batch)
        if ending and not self._ctx.cancelled.is_set():
            await self._ctx.running(ending)
        return session

    async def _on_state(self, stub: Any, session: trainer_pb2.Session) -> None:
        match session.state:
            case _State.STATE_LOADING:
                await self._ctx.set_status("loading the model")
            case _State.STATE_READY:
                await self._record.begin(session)
                await stub.StartSession(trainer_pb2.StartSessionRequest(session_id=self._ctx.job_id))
            case _State.STATE_RUNNING:
                await self._ctx.running()

    async def _open(self, stub: Any) -> trainer_pb2.Session:
        origin = self._origin = await asyncio.to_thread(self._record.origin)
        request = trainer_pb2.CreateSessionRequest(
            session_id=self._ctx.job_id,
            config=session_config(self._ctx.config),
            output_dir=str(self._ctx.output_dir),
            resume_from=origin.checkpoint,
            fresh=origin.fresh,
        )
        session = await self._create_session(stub, request)
        if session.state == _State.STATE_STOPPED or _may_be_made_again(session):
            # What an earlier run left: the same session cannot go on, a new one takes up from its checkpoint.
            await stub.DeleteSession(trainer_pb2.DeleteSessionRequest(session_id=self._ctx.job_id))
            session = await stub.CreateSession(request)
        return session

    async def _create_session(self, stub: Any, request: trainer_pb2.CreateSessionRequest) -> trainer_pb2.Session:
        """CreateSession; waits while a trainer that others use too is at work on another job."""
        while True:
            try:
                session: trainer_pb2.Session = await stub.CreateSession(request)
                return session
            except FailedPreconditionError as error:
                if error.reason != "TRAINER_OCCUPIED":
                    raise
                await self._ctx.set_status(f"waiting: {_first_line(error)}")
            await asyncio.sleep(_OCCUPIED_PAUSE)

    async def _stop_when_cancelled(self, stub: Any) -> None:
        """Ends the session on a cancellation: it saves first, and its last events arrive on the stream."""
        await self._ctx.cancelled.wait()
        await self._ctx.set_status("saving a checkpoint and stopping")
        with suppress(NotFoundError, UnavailableError):
            request = trainer_pb2.DeleteSessionRequest(session_id=self._ctx.job_id)
            await stub.DeleteSession(request, timeout=_STOP_SECONDS)

    async def _forget_session(self) -> None:
        """Frees what the trainer keeps of an ended session; that it is gone already does no harm."""
        with suppress(SurogateError):
            stub = await self._stub()
            request = trainer_pb2.DeleteSessionRequest(session_id=self._ctx.job_id)
            await stub.DeleteSession(request, timeout=_CLEAN_UP_SECONDS)

    def _raise_failure(self, session: trainer_pb2.Session) -> None:
        if session.state == _State.STATE_FAILED:
            raise from_status(session.error)
        if session.state == _State.STATE_STOPPED:
            if self._ctx.cancelled.is_set():
                raise CancelledError("cancelled")
            raise UnavailableError("the trainer stopped the session")

    async def _stub(self) -> Any:
        return trainer_pb2_grpc.TrainerServiceStub(await self._trainer.channel())


def session_config(job: Any) -> Any:
    """What CreateSession takes of a job: `{kind, train}` as a Struct.

    Whether to look for a checkpoint is said in each call: after a restart always, whatever the file says.
    """
    resolved = job.to_dict()
    return to_struct({"kind": resolved["kind"], "train": {**resolved["train"], "resume_from_checkpoint": True}})


async def _uncancelled(work: Coroutine[Any, Any, T]) -> T:
    """Sees `work` through before a cancellation goes on: what is half written down could not be continued."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _recoverable(error: SurogateError) -> bool:
    went_away = isinstance(error, UnavailableError | CancelledError) and error.reason != StoreUnavailableError.reason
    return went_away or error.reason in _RECOVERABLE


def _may_be_made_again(session: trainer_pb2.Session) -> bool:
    if session.state != _State.STATE_FAILED:
        return False
    return from_status(session.error).reason in {*_RECOVERABLE, _CHECKPOINT_LOST}


def _first_line(error: SurogateError) -> str:
    return error.message.partition("\n")[0]
