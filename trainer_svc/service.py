"""TrainerService: sessions by id, one at work at a time, and what the contract asks of them."""

# ruff: noqa: N802 - the methods have the names of the contract
from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import numpy as np
from google.protobuf.empty_pb2 import Empty

from surogate.errors import (
    AlreadyExistsError,
    BusyError,
    ConfigError,
    FailedPreconditionError,
    InvalidInputError,
    NotFoundError,
    Violation,
)
from surogate.rpc.server import RpcServer
from surogate.v1 import trainer_pb2 as trainer
from surogate.v1 import trainer_pb2_grpc
from trainer_svc.samples import StepLimits, receive_step
from trainer_svc.scratch import Scratch
from trainer_svc.session import Surroundings, TrainingSession
from trainer_svc.session_config import parse_session_config
from trainer_svc.settings import TrainerSettings
from trainer_svc.supervisor import WORKER_COMMAND

SERVICE = "surogate.v1.TrainerService"
MAX_SEQUENCES = 256
"""Sequences that ComputeLogprobs takes at once."""

MAX_STEPS_RECEIVED = 4
"""TrainStep streams taken in at once: a step, and repeats by a caller who lost its answer. It bounds memory."""

MAX_ENDED_SESSIONS = 64
"""Ended sessions that can still be looked at; the oldest go first."""


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """The contract of proto/surogate/v1/trainer.proto."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._sessions: dict[str, TrainingSession] = {}
        self._receiving = 0

    async def CreateSession(self, request: trainer.CreateSessionRequest, context: Any) -> trainer.Session:
        if not request.session_id:
            raise InvalidInputError("session_id is empty")
        if not request.output_dir:
            raise ConfigError.of([Violation("train.output_dir", "is empty; name a folder for checkpoints")])
        existing = self._sessions.get(request.session_id)
        if existing is not None:
            return _same(existing, request).snapshot()
        config = parse_session_config(request.config)
        self._require_free()
        session = TrainingSession(request, config, self._around)
        self._sessions[session.id] = session
        self._forget_oldest()
        session.load()
        return session.snapshot()

    async def GetSession(self, request: trainer.GetSessionRequest, context: Any) -> trainer.Session:
        return self._find(request.session_id).snapshot()

    async def StartSession(self, request: trainer.StartSessionRequest, context: Any) -> trainer.Session:
        session = self._find(request.session_id)
        session.run()
        return session.snapshot()

    async def WatchSession(
        self, request: trainer.WatchSessionRequest, context: Any
    ) -> AsyncIterator[trainer.SessionEvent]:
        session = self._find(request.session_id)
        async for event in session.events.watch(request.after_sequence):
            yield event

    async def TrainStep(
        self, request_iterator: AsyncIterator[trainer.TrainStepRequest], context: Any
    ) -> trainer.TrainStepResponse:
        found: list[TrainingSession] = []

        def accept(header: trainer.TrainStepHeader) -> StepLimits:
            found.append(self._find(header.session_id))
            return found[0].accept_step(header)

        with self._room_for_step():
            samples = await receive_step(request_iterator, accept)
        return await found[0].train_step(samples)

    async def PushWeights(self, request: trainer.PushWeightsRequest, context: Any) -> trainer.PushWeightsResponse:
        return await self._find(request.session_id).push_weights(request.version, request.targets)

    async def CreateCheckpoint(
        self, request: trainer.CreateCheckpointRequest, context: Any
    ) -> trainer.TrainerCheckpoint:
        return await self._find(request.session_id).checkpoint(request.step, request.final)

    async def ComputeLogprobs(
        self, request: trainer.ComputeLogprobsRequest, context: Any
    ) -> trainer.ComputeLogprobsResponse:
        session = self._find(request.session_id)
        _check_logprobs_request(request, session.token_limit)
        return await session.compute_logprobs(request)

    async def DeleteSession(self, request: trainer.DeleteSessionRequest, context: Any) -> Empty:
        await self._find(request.session_id).stop()
        self._sessions.pop(request.session_id, None)
        return Empty()

    async def close(self) -> None:
        """Stops whatever is at work."""
        for session in self._sessions.values():
            await session.stop()

    def _find(self, session_id: str) -> TrainingSession:
        session = self._sessions.get(session_id)
        if session is None:
            raise NotFoundError(
                f"this trainer has no session {session_id!r}; it may have restarted since", reason="NO_SUCH_SESSION"
            )
        return session

    def _require_free(self) -> None:
        busy = next((s.id for s in self._sessions.values() if not s.ended), None)
        if busy is not None:
            raise FailedPreconditionError(
                f"this trainer is at work on session {busy}; delete that one first, or use another trainer",
                reason="TRAINER_OCCUPIED",
                metadata={"session_id": busy},
            )

    @contextmanager
    def _room_for_step(self) -> Iterator[None]:
        if self._receiving >= MAX_STEPS_RECEIVED:
            raise BusyError(f"{MAX_STEPS_RECEIVED} steps are being received already; try again")
        self._receiving += 1
        try:
            yield
        finally:
            self._receiving -= 1

    def _forget_oldest(self) -> None:
        while len(self._sessions) > MAX_ENDED_SESSIONS:
            del self._sessions[next(iter(self._sessions))]


def _same(existing: TrainingSession, request: trainer.CreateSessionRequest) -> TrainingSession:
    before = existing.request
    if request.config != before.config or request.output_dir != before.output_dir:
        raise AlreadyExistsError(f"session {request.session_id} exists with another configuration; delete it first")
    return existing


def _check_logprobs_request(request: trainer.ComputeLogprobsRequest, token_limit: int) -> None:
    if not 1 <= len(request.sequences) <= MAX_SEQUENCES:
        raise InvalidInputError(f"ComputeLogprobs takes 1 to {MAX_SEQUENCES} sequences, not {len(request.sequences)}")
    if request.HasField("temperature") and not 0 < request.temperature < float("inf"):
        raise InvalidInputError(f"temperature is {request.temperature}; it must be above 0")
    for index, sequence in enumerate(request.sequences):
        ids = np.array(sequence.ids, dtype=np.int64)
        if len(ids) < 2:
            raise InvalidInputError(f"sequences[{index}] has {len(ids)} tokens; at least 2 are needed")
        if ids.min() < 0 or (token_limit and ids.max() >= token_limit):
            raise InvalidInputError(f"sequences[{index}] has token ids outside 0 to {token_limit - 1}")


@asynccontextmanager
async def lifespan(
    server: RpcServer, settings: TrainerSettings, *, worker_command: Sequence[str] = WORKER_COMMAND
) -> AsyncIterator[None]:
    """Registers the servicer; at the end stops workers and frees memory."""
    scratch = Scratch(settings.scratch_dir)
    servicer = TrainerServicer(Surroundings(settings, scratch, uuid.uuid4().hex, worker_command))
    server.add(trainer_pb2_grpc.add_TrainerServiceServicer_to_server, servicer, SERVICE)
    try:
        yield
    finally:
        await servicer.close()
        scratch.close()
