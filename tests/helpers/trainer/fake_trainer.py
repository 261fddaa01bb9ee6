"""`python -m tests.helpers.trainer.fake_trainer`: a trainer service without a model, that saves and misbehaves.

The last part of `train.model` says what it does; steps take FAKE_STEP_SECONDS. A checkpoint is an empty folder.
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.json_format import MessageToDict

from surogate import service
from surogate.config.service import ServiceSettings
from surogate.errors import (
    ConfigError,
    DataLossError,
    FailedPreconditionError,
    InternalError,
    NotFoundError,
    SurogateError,
    Violation,
)
from surogate.rpc.server import RpcServer
from surogate.rpc.status import to_status
from surogate.v1 import trainer_pb2, trainer_pb2_grpc
from trainer_svc.events import EventLog

SERVICE = "surogate.v1.TrainerService"
State = trainer_pb2.Session
STOP_SECONDS = 5.0
"""Given to a step in hand when a session is stopped."""
ACTIVE = (State.STATE_LOADING, State.STATE_READY, State.STATE_RUNNING)


class FakeTrainer(trainer_pb2_grpc.TrainerServiceServicer):
    """Sessions whose loss at step n is 1/n."""

    def __init__(self, step_seconds: float | None = None) -> None:
        self.incarnation = uuid.uuid4().hex
        self.sessions: dict[str, FakeSession] = {}
        self.requests: list[trainer_pb2.CreateSessionRequest] = []
        self.step_seconds = float(os.environ.get("FAKE_STEP_SECONDS", "0")) if step_seconds is None else step_seconds

    async def CreateSession(self, request: trainer_pb2.CreateSessionRequest, context: Any) -> trainer_pb2.Session:
        self.requests.append(request)
        if request.session_id not in self.sessions:
            busy = [name for name, session in self.sessions.items() if session.session.state in ACTIVE]
            if busy:
                raise FailedPreconditionError(f"at work on session {busy[0]}", reason="TRAINER_OCCUPIED")
            self.sessions[request.session_id] = FakeSession(request, self.incarnation, self.step_seconds)
        return self.sessions[request.session_id].session

    async def StartSession(self, request: trainer_pb2.StartSessionRequest, context: Any) -> trainer_pb2.Session:
        return self._find(request.session_id).start()

    async def GetSession(self, request: trainer_pb2.GetSessionRequest, context: Any) -> trainer_pb2.Session:
        return self._find(request.session_id).session

    async def WatchSession(
        self, request: trainer_pb2.WatchSessionRequest, context: Any
    ) -> AsyncIterator[trainer_pb2.SessionEvent]:
        async for event in self._find(request.session_id).events.watch(request.after_sequence):
            yield event

    async def DeleteSession(self, request: trainer_pb2.DeleteSessionRequest, context: Any) -> Empty:
        await self._find(request.session_id).stop()
        del self.sessions[request.session_id]
        return Empty()

    def _find(self, session_id: str) -> FakeSession:
        if session_id not in self.sessions:
            raise NotFoundError(f"no session {session_id}", reason="NO_SUCH_SESSION")
        return self.sessions[session_id]


class FakeSession:
    """One session: a task that counts."""

    def __init__(self, request: trainer_pb2.CreateSessionRequest, incarnation: str, step_seconds: float) -> None:
        self.train: dict[str, Any] = MessageToDict(request.config)["train"]
        self.mode = Path(self.train["model"]).name
        self.output = Path(request.output_dir)
        self.step_seconds = step_seconds
        self.events = EventLog()
        self.session = State(
            session_id=request.session_id,
            state=State.STATE_LOADING,
            incarnation=incarnation,
            max_steps=int(self.train["max_steps"]),
        )
        self.session.create_time.GetCurrentTime()
        self._stopping = False
        self._announce()
        self._task = asyncio.create_task(self._guard(self._load(request.resume_from, request.fresh)))

    def start(self) -> trainer_pb2.Session:
        if self.session.state == State.STATE_READY:
            self._become(State.STATE_RUNNING)
            self._task = asyncio.create_task(self._guard(self._run()))
        return self.session

    async def stop(self) -> None:
        if self.session.state == State.STATE_RUNNING:
            self._stopping = True
            await asyncio.wait({self._task}, timeout=STOP_SECONDS)  # the step in hand, as long as that takes no longer
            self._save()
        self._task.cancel()
        if self.session.state in ACTIVE:
            self._become(State.STATE_STOPPED)
        self.events.close()

    async def _load(self, resume_from: str, fresh: bool) -> None:
        if self.mode == "no-model":
            raise ConfigError.of([Violation("train.model", "has no weights in it")])
        if self.mode == "loads-forever":
            await asyncio.Event().wait()
        if self.mode == "dies-loading":
            os._exit(1)
        await asyncio.sleep(0.01)
        found = sorted(self.output.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        checkpoint = Path(resume_from) if resume_from else next(reversed(found), None)
        if resume_from and Path(resume_from) not in found:
            raise DataLossError(f"{resume_from} is not a complete checkpoint", reason="CHECKPOINT_DAMAGED")
        if checkpoint is not None and (resume_from or (self.train["resume_from_checkpoint"] and not fresh)):
            self.session.step = self.session.checkpoint_step = int(checkpoint.name[11:])
            self.session.checkpoint = str(checkpoint)
        self._become(State.STATE_READY)

    async def _run(self) -> None:
        if self.mode == "warns":
            self.events.add(trainer_pb2.SessionEvent(warning="the learning rate is high"))
        while self.session.step < self.session.max_steps and not self._stopping:
            await asyncio.sleep(self.step_seconds)
            self.session.step += 1
            step = trainer_pb2.TrainerStep(step=self.session.step, metrics={"loss": 1 / self.session.step})
            self.events.add(trainer_pb2.SessionEvent(step=step))
            self._misbehave()
            if self.session.step % int(self.train["save_steps"]) == 0:
                self._save()
        if self._stopping:
            return
        done = trainer_pb2.TrainerEvaluation(step=self.session.step, metrics={"eval/loss": 0.5})
        self.events.add(trainer_pb2.SessionEvent(evaluation=done))
        final = trainer_pb2.TrainerCheckpoint(step=self.session.step, path=str(self.output), final=True)
        self.events.add(trainer_pb2.SessionEvent(checkpoint=final))
        self._become(State.STATE_SUCCEEDED)
        self.events.close()

    def _misbehave(self) -> None:
        once = self.output / "misbehaved"
        if self.session.step != 3 or once.exists():
            return
        if self.mode == "worker-dies-once":
            once.touch()
            raise InternalError("the training worker was killed by SIGKILL", reason="WORKER_DIED")
        if self.mode == "front-dies-once":
            once.touch()
            os._exit(9)
        if self.mode == "front-always-dies":
            os._exit(9)
        if self.mode == "diverges":
            raise InternalError("the loss is not a number", reason="LOSS_NOT_FINITE")

    def _save(self) -> None:
        path = self.output / f"checkpoint-{self.session.step}"
        path.mkdir(parents=True, exist_ok=True)
        self.session.checkpoint, self.session.checkpoint_step = str(path), self.session.step
        saved = trainer_pb2.TrainerCheckpoint(step=self.session.step, path=str(path))
        self.events.add(trainer_pb2.SessionEvent(checkpoint=saved))

    async def _guard(self, work: Any) -> None:
        try:
            await work
        except SurogateError as error:
            self.session.error.CopyFrom(to_status(error))
            self._become(State.STATE_FAILED)
            self.events.close()

    def _become(self, state: State.State.ValueType) -> None:
        self.session.state = state
        self._announce()

    def _announce(self) -> None:
        now = trainer_pb2.Session()
        now.CopyFrom(self.session)
        self.events.add(trainer_pb2.SessionEvent(session=now))


@asynccontextmanager
async def lifespan(server: RpcServer, settings: ServiceSettings) -> AsyncIterator[None]:
    """Serves the fake; like the real one, it saves when the process is told to end."""
    trainer = FakeTrainer()
    server.add(trainer_pb2_grpc.add_TrainerServiceServicer_to_server, trainer, SERVICE)
    yield
    for session in trainer.sessions.values():
        await session.stop()


if __name__ == "__main__":
    sys.exit(service.main(ServiceSettings, lifespan))
