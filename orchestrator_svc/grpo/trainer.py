"""The trainer as the loop sees it: steps that are done however often it dies.

A trainer that comes back resumes from the job's last checkpoint; the steps after that are trained again from the
ledger, on the very samples of the first time, before the call that failed is made again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

from google.protobuf.struct_pb2 import Struct

from orchestrator_svc.grpo.ledger import Ledger
from orchestrator_svc.grpo.samples import step_messages
from orchestrator_svc.grpo.stalls import Stalls
from orchestrator_svc.jobstore.database import StoreUnavailableError
from orchestrator_svc.launchers.base import READY_TIMEOUT, Worker
from surogate.errors import DataLossError, FailedPreconditionError, NotFoundError, SurogateError, UnavailableError
from surogate.rpc.status import from_status
from surogate.telemetry.log import get_logger
from surogate.v1 import trainer_pb2, trainer_pb2_grpc

MAX_RECOVERIES = 4
"""Times that one call is made again after the trainer went away or failed."""

RECOVERY_PAUSE = 0.25
"""Seconds before a lost trainer is called again; doubles from time to time."""

_RECOVERABLE = frozenset(
    {"NO_SUCH_SESSION", "SESSION_FAILED", "SESSION_NOT_READY", "SESSION_STOPPED", "WORKER_DIED", "WORKER_HUNG"}
)
_TRAINER, _LOST = "the trainer", "it was lost, and does again what no checkpoint holds"
_LOADING = trainer_pb2.Session.STATE_LOADING
_READY = trainer_pb2.Session.STATE_READY

T = TypeVar("T")
Stub: TypeAlias = "trainer_pb2_grpc.TrainerServiceAsyncStub"
_log = get_logger("orchestrator")


@dataclass(frozen=True)
class Origin:
    """Where a new incarnation of the trainer starts from."""

    checkpoint: str = ""
    """Folder; empty with `fresh` false leaves the choice to the trainer: the newest in its output folder."""
    fresh: bool = True
    """Whether to ignore checkpoints where `checkpoint` is empty."""


class Listener(Protocol):
    """Who is told what the trainer does by itself."""

    async def replayed(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step was trained again from the ledger."""

    async def warned(self, text: str) -> None:
        """The trainer has something to say to people."""


class Trainer:
    """One GRPO session, through all incarnations of the trainer. One call at a time.

    Attributes:
        step: Optimiser steps done.
        base_id: The base that its adapters are added to, where that is not the model as replicas load it.
        origin: Where the next incarnation starts.
    """

    def __init__(
        self,
        worker: Worker,
        ledger: Ledger,
        listener: Listener,
        *,
        session_id: str,
        config: Struct,
        output_dir: str,
        keep_interval: int = 0,
        adapter_name: str = "",
        merge_pushes: bool = False,
        stalls: Stalls | None = None,
    ) -> None:
        self._stalls = stalls or Stalls()
        self.step = 0
        self.base_id = ""
        self.origin = Origin()
        self._worker = worker
        self._ledger = ledger
        self._listener = listener
        self._id = session_id
        self._config = config
        self._output_dir = output_dir
        self._keep_interval = keep_interval
        self._adapter_name = adapter_name
        self._merge_pushes = merge_pushes
        self._adopts = False  # whether the session's own step is taken for `step`
        self._known = 0  # generation of the worker that has the session at `step`; 0: none
        self._turn = asyncio.Lock()

    async def open(self, origin: Origin, step: int | None) -> trainer_pb2.Session:
        """Opens the session, or finds it open, and trains it up to `step` from the ledger.

        `step` None takes the step of the checkpoint that it starts from.
        """
        self.origin = origin

        async def call(stub: Stub) -> trainer_pb2.Session:
            return await stub.GetSession(trainer_pb2.GetSessionRequest(session_id=self._id))

        self.step = step or 0
        self._adopts = step is None
        session = await self._calling(call)
        self._adopts = False
        return session

    async def train(self, step: int, samples: Sequence[trainer_pb2.TrainingSample]) -> Mapping[str, float]:
        """Trains the step after the last one, or the last one's repeat, and returns the trainer's metrics."""

        async def call(stub: Stub) -> trainer_pb2.TrainStepResponse:
            return await stub.TrainStep(step_messages(self._id, step, samples))

        response = await self._calling(call)
        self.step = step
        return dict(response.metrics)

    async def push(self, targets: Sequence[str]) -> trainer_pb2.PushWeightsResponse:
        """Gives the weights after the last step to replicas. What went wrong at a replica is in the response."""
        return await self._push(targets, lambda: self.step)

    async def push_base(self, targets: Sequence[str]) -> trainer_pb2.PushWeightsResponse:
        """Gives the base under the adapters to replicas that serve version 0."""
        return await self._push(targets, lambda: 0)

    async def _push(self, targets: Sequence[str], version: Callable[[], int]) -> trainer_pb2.PushWeightsResponse:
        """`version()` is asked when the call's turn has come: a step may be trained before."""

        async def call(stub: Stub) -> trainer_pb2.PushWeightsResponse:
            request = trainer_pb2.PushWeightsRequest(session_id=self._id, targets=targets, version=version())
            return await stub.PushWeights(request)

        return await self._calling(call)

    async def checkpoint(self, *, final: bool = False) -> trainer_pb2.TrainerCheckpoint:
        """Writes a checkpoint of the last step, from which later incarnations start."""

        async def call(stub: Stub) -> trainer_pb2.TrainerCheckpoint:
            request = trainer_pb2.CreateCheckpointRequest(session_id=self._id, step=self.step, final=final)
            return await stub.CreateCheckpoint(request)

        saved = await self._calling(call)
        self.origin = Origin(saved.path, fresh=False)
        return saved

    async def logprobs(self, ids: Sequence[int], temperature: float) -> list[float]:
        """Logprobs of given tokens but the first under the weights after the last step."""

        async def call(stub: Stub) -> trainer_pb2.ComputeLogprobsResponse:
            request = trainer_pb2.ComputeLogprobsRequest(session_id=self._id, temperature=temperature)
            request.sequences.add(ids=ids)
            return await stub.ComputeLogprobs(request)

        return list((await self._calling(call)).sequences[0].logprobs)

    async def close(self) -> None:
        """Ends the session and frees its memory."""
        stub = await self._stub()
        await stub.DeleteSession(trainer_pb2.DeleteSessionRequest(session_id=self._id))

    async def _calling(self, call: Callable[[Stub], Awaitable[T]]) -> T:
        """Makes a call, and makes it again when the trainer was lost and is back where it was."""
        async with self._turn:
            for attempt in range(MAX_RECOVERIES + 1):
                try:
                    if self._known and (not self._worker.address or self._worker.generation != self._known):
                        await self._stalls.begin(_TRAINER, _LOST)
                    await self._worker.ready(READY_TIMEOUT)
                    stub = await self._stub()
                    await self._synchronise(stub)
                    await self._stalls.end(_TRAINER)
                    return await call(stub)
                except SurogateError as error:
                    self._known = 0
                    if not _recoverable(error) or attempt == MAX_RECOVERIES:
                        raise
                    _log.warning("the trainer was lost; trying again", error=str(error), attempt=attempt + 1)
                    await self._stalls.begin(_TRAINER, _LOST)
                await asyncio.sleep(RECOVERY_PAUSE * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    async def _synchronise(self, stub: Stub) -> None:
        """Makes sure that this incarnation has the session, with `step` steps done."""
        generation = self._worker.generation
        if generation == self._known:
            return
        session = await self._session(stub)
        self.base_id = session.base_id
        if self._adopts:
            self.step = session.step
        if session.step > self.step + 1:
            raise FailedPreconditionError(
                f"the trainer is at step {session.step}, this job at {self.step}: the session is not this job's own",
                reason="TRAINER_AHEAD",
            )
        for step in range(session.step + 1, self.step + 1):
            await self._replay(stub, step)
        self._known = generation

    async def _replay(self, stub: Stub, step: int) -> None:
        samples = await self._ledger.samples(step)
        if samples is None:
            raise DataLossError(
                f"the trainer has lost step {step}, and the ledger has given its samples up to a checkpoint that the "
                "trainer does not find; start a new job from the newest checkpoint that is left",
                reason="CHECKPOINT_LOST",
            )
        response = await stub.TrainStep(step_messages(self._id, step, samples))
        await self._listener.replayed(step, dict(response.metrics))

    async def _session(self, stub: Stub) -> trainer_pb2.Session:
        """The session, ready: the one that is there, else a new one from `origin`."""
        try:
            session = await stub.GetSession(trainer_pb2.GetSessionRequest(session_id=self._id))
        except NotFoundError:
            return await self._created(stub, self.origin)
        if session.state == _LOADING:
            session = await self._loaded(stub)
        if session.state == _READY:
            return session
        await self.close()
        return await self._created(stub, self.origin)

    async def _created(self, stub: Stub, origin: Origin) -> trainer_pb2.Session:
        await stub.CreateSession(
            trainer_pb2.CreateSessionRequest(
                session_id=self._id,
                config=self._config,
                output_dir=self._output_dir,
                resume_from=origin.checkpoint,
                fresh=origin.fresh and not origin.checkpoint,
                keep_interval=self._keep_interval,
                adapter_name=self._adapter_name,
                merge_pushes=self._merge_pushes,
            )
        )
        session = await self._loaded(stub)
        if session.state == _READY:
            return session
        error = from_status(session.error)
        await self.close()
        if origin.checkpoint and not _recoverable(error):
            # A checkpoint that was replaced by a newer one just before this orchestrator could write that down.
            _log.warning("cannot resume from the recorded checkpoint; trying the newest", error=str(error))
            return await self._created(stub, Origin(fresh=False))
        raise error

    async def _loaded(self, stub: Stub) -> trainer_pb2.Session:
        """Waits until the session is no longer LOADING."""
        session = trainer_pb2.Session()
        request = trainer_pb2.WatchSessionRequest(session_id=self._id)
        async for event in stub.WatchSession(request, timeout=READY_TIMEOUT):
            if event.HasField("warning"):
                await self._listener.warned(event.warning)
            if event.HasField("session"):
                session = event.session
                if session.state != _LOADING:
                    return session
        raise UnavailableError(f"the trainer stopped telling about session {self._id}")

    async def _stub(self) -> Stub:
        return trainer_pb2_grpc.TrainerServiceStub(await self._worker.channel())


def _recoverable(error: SurogateError) -> bool:
    """Whether it is the trainer that is away; the store has been waited for already."""
    went_away = isinstance(error, UnavailableError) and not isinstance(error, StoreUnavailableError)
    return went_away or error.reason in _RECOVERABLE
