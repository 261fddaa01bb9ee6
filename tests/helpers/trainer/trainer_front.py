"""A real trainer front on port 0 with the fake worker behind it, and short ways to talk to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from surogate.rpc.channel import open_channel
from surogate.rpc.server import RpcServer
from surogate.v1 import trainer_pb2 as trainer
from surogate.v1 import trainer_pb2_grpc
from tests.helpers.trainer import fake_worker
from tests.helpers.waiting import until
from trainer_svc.scratch import Scratch
from trainer_svc.service import SERVICE, TrainerServicer
from trainer_svc.session import ENDED, Surroundings
from trainer_svc.settings import TrainerSettings

State = trainer.Session.State
ID = "job-1"


class Front:
    """A client of the front under test."""

    def __init__(self, stub: trainer_pb2_grpc.TrainerServiceAsyncStub, output: Path, scratch: Scratch) -> None:
        self.stub = stub
        self.output = output
        self.scratch = scratch

    async def create(
        self, kind: str = "grpo", model: str = "model", session_id: str = ID, **more: Any
    ) -> trainer.Session:
        """CreateSession."""
        return await self.stub.CreateSession(self.create_request(kind, model, session_id, **more))

    def create_request(
        self,
        kind: str,
        model: str,
        session_id: str = ID,
        *,
        max_steps: int = 5,
        train: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> trainer.CreateSessionRequest:
        """A request of CreateSession. `train` adds keys of train.yaml to those that the fake worker knows."""
        request = trainer.CreateSessionRequest(session_id=session_id, output_dir=str(self.output), **more)
        keys = {"model": model, "max_steps": max_steps, "output_dir": str(self.output)}
        if kind != "grpo":
            keys["datasets"] = [{"path": str(self.output / "data.jsonl"), "type": "text" if kind == "pt" else "auto"}]
        request.config.update({"kind": kind, "train": {**keys, **(train or {})}})
        return request

    async def get(self, session_id: str = ID) -> trainer.Session:
        """GetSession."""
        return await self.stub.GetSession(trainer.GetSessionRequest(session_id=session_id))

    async def until(self, *states: trainer.Session.State.ValueType, session_id: str = ID) -> trainer.Session:
        """Watches until the session is in one of the states, or has ended."""
        request = trainer.WatchSessionRequest(session_id=session_id)
        async for event in self.stub.WatchSession(request, timeout=60):
            if event.HasField("session") and event.session.state in (*states, *ENDED):
                return event.session
        raise AssertionError("the session ended without saying how")

    async def ready(self, kind: str = "grpo", **more: Any) -> trainer.Session:
        """Creates a session and waits until it is READY."""
        await self.create(kind, **more)
        session = await self.until(State.STATE_READY)
        assert session.state == State.STATE_READY, session.error.message
        return session

    async def train(
        self, step: int, ids: Sequence[str] = ("a", "b"), advantage: float = 1.0, session_id: str = ID
    ) -> trainer.TrainStepResponse:
        """TrainStep with small samples of these ids."""
        samples = [sample(name, advantage=advantage) for name in ids]
        return await self.send([header(step, len(samples), session_id), trained(samples)])

    async def send(self, requests: Sequence[trainer.TrainStepRequest]) -> trainer.TrainStepResponse:
        """TrainStep with these messages."""
        return await self.stub.TrainStep(iter(requests), timeout=60)

    async def until_begun(self, step: int) -> None:
        """Waits until the worker works on a step."""
        await until((self.output / f"begun-{step}").exists)

    def trained(self) -> list[str]:
        """What the worker really trained on: a line a step, the number and the samples' ids."""
        file = self.output / "trained"
        return file.read_text().splitlines() if file.exists() else []


def header(step: int, num_samples: int, session_id: str = ID) -> trainer.TrainStepRequest:
    """First message of a step."""
    content = trainer.TrainStepHeader(session_id=session_id, step=step, num_samples=num_samples)
    return trainer.TrainStepRequest(header=content)


def trained(samples: Sequence[trainer.TrainingSample]) -> trainer.TrainStepRequest:
    """Later message of a step."""
    return trainer.TrainStepRequest(samples=trainer.TrainStepSamples(samples=samples))


def sample(sample_id: str, **changes: Any) -> trainer.TrainingSample:
    """A prompt of two tokens and a completion of two."""
    fields: dict[str, Any] = {
        "token_ids": [5, 6, 7, 8],
        "loss_mask": [False, False, True, True],
        "sampler_logprobs": [0.0, 0.0, -0.5, -1.5],
        "advantage": 1.0,
        "temperature": 0.8,
    }
    return trainer.TrainingSample(sample_id=sample_id, **{**fields, **changes})


@asynccontextmanager
async def serving(
    folder: Path, *, push: Any = None, command: Sequence[str] = fake_worker.COMMAND, **settings: Any
) -> AsyncIterator[Front]:
    """Serves a trainer front, on the fake worker unless `command` starts another, with its files under `folder`."""
    output, memory = folder / "output", folder / "shm"
    output.mkdir(exist_ok=True)
    memory.mkdir(exist_ok=True)
    resolved = TrainerSettings(metrics_listen="", scratch_dir=memory, **settings)
    scratch = Scratch(memory)
    server = RpcServer(resolved)
    servicer = TrainerServicer(Surroundings(resolved, scratch, "incarnation-1", command, push))
    server.add(trainer_pb2_grpc.add_TrainerServiceServicer_to_server, servicer, SERVICE)
    await server.start()
    try:
        async with open_channel(server.address) as channel:
            yield Front(trainer_pb2_grpc.TrainerServiceStub(channel), output, scratch)
    finally:
        await server.stop()
        await servicer.close()
        scratch.close()
