"""The worker's end of the connection: commands in order, a stop seen at once, errors sorted into fatal and not."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest

from surogate.errors import DataLossError, InvalidInputError
from surogate.internal.v1 import worker_pb2 as worker
from surogate.v1 import trainer_pb2 as trainer
from tests.helpers.waiting import PATIENCE, until
from trainer_svc.worker_client import WorkerClient, WorkerLostError, WorkerSilentError
from trainer_svc.worker_protocol import WorkerServer


class Engine:
    """A handler that does what a test tells it to do in a step, and runs until it is stopped."""

    def __init__(self, server: WorkerServer, in_step: Callable[[], Mapping[str, float]]) -> None:
        self._server = server
        self._in_step = in_step
        self.saved: bool | None = None

    def open(self, session: trainer.CreateSessionRequest) -> worker.OpenReply:
        return worker.OpenReply(step=3)

    def run(self) -> worker.RunReply:
        step = 0
        while not self._server.stop_requested:
            step += 1
            self._server.step(step, {"loss": 1.0})
            threading.Event().wait(0.01)
        return worker.RunReply(stopped=True)

    def train_step(self, step: int, samples: Sequence[trainer.TrainingSample]) -> Mapping[str, float]:
        return self._in_step()

    def export_weights(self, version: int, directory: str) -> worker.ExportWeightsReply:
        return worker.ExportWeightsReply(path=directory)

    def checkpoint(self, final: bool) -> trainer.TrainerCheckpoint:
        return trainer.TrainerCheckpoint(final=final)

    def compute_logprobs(self, request: trainer.ComputeLogprobsRequest) -> trainer.ComputeLogprobsResponse:
        return trainer.ComputeLogprobsResponse()

    def stop(self, save: bool) -> None:
        self.saved = save


class Worker:
    """A worker in a thread, and the client that talks to it."""

    def __init__(self, client: WorkerClient, engine: Engine, codes: list[int]) -> None:
        self.client = client
        self.engine = engine
        self.codes = codes

    async def ask(self, silence: float = PATIENCE, **command: object) -> worker.WorkerReply:
        return await self.client.request(worker.WorkerCommand(**command), silence=silence)


@asynccontextmanager
async def working(
    in_step: Callable[[], Mapping[str, float]] = dict, events: list[worker.WorkerEvent] | None = None
) -> AsyncIterator[Worker]:
    ours, theirs = socket.socketpair()
    server = WorkerServer(theirs.detach())
    engine, codes = Engine(server, in_step), list[int]()
    thread = threading.Thread(target=lambda: codes.append(server.serve(engine)), daemon=True)
    thread.start()
    client = await WorkerClient.connect(ours, (events if events is not None else []).append)
    worker_in_thread = Worker(client, engine, codes)
    yield worker_in_thread
    if not codes:
        await worker_in_thread.ask(stop=worker.StopCommand())
    await asyncio.to_thread(thread.join)
    await client.close()


STEP = worker.TrainStepCommand(step=1)


async def test_commands_are_carried_out_and_replied_to() -> None:
    async with working(lambda: {"loss": 2.0}) as it:
        assert (await it.ask(open=worker.OpenCommand())).open.step == 3
        assert (await it.ask(train_step=STEP)).train_step.metrics == {"loss": 2.0}
        assert (await it.ask(export_weights=worker.ExportWeightsCommand(directory="d"))).export_weights.path == "d"
        assert (await it.ask(checkpoint=worker.CheckpointCommand(final=True))).checkpoint.final
        assert (await it.ask(compute_logprobs=trainer.ComputeLogprobsRequest())).HasField("compute_logprobs")


async def test_a_stop_ends_a_run_and_then_the_worker() -> None:
    events: list[worker.WorkerEvent] = []
    async with working(events=events) as it:
        run = asyncio.create_task(it.ask(run=worker.RunCommand()))
        await asyncio.sleep(0.05)
        await it.ask(stop=worker.StopCommand(save=True))
        assert (await run).run.stopped
        assert it.engine.saved is True
    assert it.codes == [0]
    assert [event.step.step for event in events] == list(range(1, len(events) + 1))


async def test_a_refusal_leaves_the_worker_at_work() -> None:
    def refuse() -> Mapping[str, float]:
        raise InvalidInputError("not these samples")

    async with working(refuse) as it:
        with pytest.raises(InvalidInputError, match="not these samples"):
            await it.ask(train_step=STEP)
        assert (await it.ask(open=worker.OpenCommand())).open.step == 3


@pytest.mark.parametrize("error", [ZeroDivisionError("oops"), DataLossError("a file is cut off")], ids=repr)
async def test_a_fault_ends_the_worker_and_is_kept(error: Exception) -> None:
    def fail() -> Mapping[str, float]:
        raise error

    async with working(fail) as it:
        with pytest.raises(WorkerLostError):
            await it.ask(train_step=STEP)
        assert str(error) in str(it.client.fatal)
        with pytest.raises(WorkerLostError):
            await it.ask(open=worker.OpenCommand())
        await until(lambda: it.codes)
    assert it.codes == [1]


async def test_silence_is_noticed_and_events_break_it() -> None:
    release = threading.Event()
    async with working(lambda: {"waited": float(release.wait(PATIENCE))}) as it:
        with pytest.raises(WorkerSilentError):
            await it.ask(silence=0.05, train_step=STEP)
        release.set()
        run = asyncio.create_task(it.ask(silence=3.0, run=worker.RunCommand()))
        await asyncio.sleep(4.0)
        assert not run.done()
        await it.ask(stop=worker.StopCommand())
        await run
