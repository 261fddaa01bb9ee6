"""The trainer as a process of its own, with its real worker, and short ways to talk to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from surogate.process import ServiceProcess, start_service
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.rpc.health import wait_serving
from surogate.v1 import trainer_pb2, trainer_pb2_grpc
from tests.helpers.inference import TOKEN

SERVICE = "surogate.v1.TrainerService"
SESSION = "job"


class TrainerProcess:
    """One GRPO session of a trainer."""

    def __init__(self, process: ServiceProcess, stub: Any, output: Path) -> None:
        self.process = process
        self.stub = stub
        self.output = output

    async def ready(self, train: Mapping[str, Any], *, resume_from: str = "") -> trainer_pb2.Session:
        """Opens the session, and waits until the model is loaded."""
        request = trainer_pb2.CreateSessionRequest(
            session_id=SESSION, output_dir=str(self.output), resume_from=resume_from, fresh=not resume_from
        )
        request.config.update({"kind": "grpo", "train": dict(train)})
        await self.stub.CreateSession(request)
        watch = trainer_pb2.WatchSessionRequest(session_id=SESSION)
        async for event in self.stub.WatchSession(watch, timeout=120):
            if event.HasField("session") and event.session.state != trainer_pb2.Session.STATE_LOADING:
                assert event.session.state == trainer_pb2.Session.STATE_READY, event.session.error.message
                return event.session
        raise AssertionError("the session ended without saying how")

    async def train(self, step: int, samples: Sequence[trainer_pb2.TrainingSample]) -> dict[str, float]:
        """Trains a step; returns its metrics."""
        header = trainer_pb2.TrainStepHeader(session_id=SESSION, step=step, num_samples=len(samples))
        requests = [
            trainer_pb2.TrainStepRequest(header=header),
            trainer_pb2.TrainStepRequest(samples=trainer_pb2.TrainStepSamples(samples=samples)),
        ]
        return dict((await self.stub.TrainStep(iter(requests), timeout=120)).metrics)

    async def push(self, version: int, *targets: str) -> trainer_pb2.PushWeightsResponse:
        """Gives the weights after a step to replicas."""
        request = trainer_pb2.PushWeightsRequest(session_id=SESSION, version=version, targets=targets)
        return await self.stub.PushWeights(request, timeout=60)

    async def checkpoint(self, step: int, *, final: bool = False) -> str:
        """Writes a checkpoint; returns its folder."""
        request = trainer_pb2.CreateCheckpointRequest(session_id=SESSION, step=step, final=final)
        return (await self.stub.CreateCheckpoint(request, timeout=60)).path

    async def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float) -> list[list[float]]:
        """Logprobs of every token but the first of each sequence."""
        request = trainer_pb2.ComputeLogprobsRequest(session_id=SESSION, temperature=temperature)
        for ids in sequences:
            request.sequences.add(ids=ids)
        response = await self.stub.ComputeLogprobs(request, timeout=120)
        return [list(scored.logprobs) for scored in response.sequences]

    async def close(self) -> None:
        """Ends the session; the process stays."""
        await self.stub.DeleteSession(trainer_pb2.DeleteSessionRequest(session_id=SESSION))


@asynccontextmanager
async def trainer_process(folder: Path) -> AsyncIterator[TrainerProcess]:
    """`python -m trainer_svc`; what it writes, its log too, is in `folder`."""
    process = await start_service(
        "trainer_svc", log_file=folder / "trainer.log", token=TOKEN, environment={"OMP_NUM_THREADS": "1"}
    )
    try:
        async with open_channel(process.address, ClientSecurity(token=TOKEN)) as channel:
            await wait_serving(channel, SERVICE, timeout=240)
            yield TrainerProcess(process, trainer_pb2_grpc.TrainerServiceStub(channel), folder)
    finally:
        await process.stop()
