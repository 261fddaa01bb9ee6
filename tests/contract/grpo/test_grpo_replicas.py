"""Pushes while replicas come and go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from google.protobuf.empty_pb2 import Empty

from orchestrator_svc.grpo.fatal import ReplicasLostError
from orchestrator_svc.grpo.rollouts.replicas import Replicas
from orchestrator_svc.launchers.base import READY_TIMEOUT
from orchestrator_svc.launchers.static import StaticWorker
from surogate.errors import FailedPreconditionError, UnavailableError
from surogate.rpc.channel import ClientSecurity
from surogate.rpc.server import RpcServer
from surogate.rpc.status import to_status
from surogate.v1 import inference_pb2_grpc, trainer_pb2, weights_pb2, weights_pb2_grpc
from surogate.weights.servicer import SERVICE as UPDATES
from tests.helpers.grpo.grpo_fakes import FakeInference, Hooks, serving_fakes
from tests.helpers.grpo.grpo_job import FakeWorker
from tests.helpers.rpc import serving
from tests.helpers.waiting import PATIENCE, until


class ComingBack(FakeWorker):
    """A worker that is ready when the test says so."""

    def __init__(self, address: str) -> None:
        super().__init__("inference", 0, address)
        self.up = asyncio.Event()
        self.up.set()

    async def ready(self, timeout: float = READY_TIMEOUT) -> int:
        await self.up.wait()
        return await super().ready(timeout)


class One:
    """One replica, and the trainer's version."""

    def __init__(self, worker: ComingBack, inference: FakeInference) -> None:
        self.worker, self.inference = worker, inference
        self.step = 0
        self.base_id = ""
        self.away = False
        self.replicas = Replicas([worker], self)

    async def push_base(self, targets: Sequence[str]) -> trainer_pb2.PushWeightsResponse:
        assert targets == [self.worker.address]
        self.inference.base_id = self.base_id
        response = trainer_pb2.PushWeightsResponse()
        response.replicas.add(target=targets[0])
        return response

    async def push(self, targets: Sequence[str]) -> trainer_pb2.PushWeightsResponse:
        assert targets == [self.worker.address]
        response = trainer_pb2.PushWeightsResponse(version=self.step)
        outcome = response.replicas.add(target=targets[0])
        if self.inference.base_id != self.base_id:
            outcome.error.CopyFrom(to_status(FailedPreconditionError("push that base first", reason="OTHER_BASE")))
        elif self.away:
            outcome.error.CopyFrom(to_status(UnavailableError("it is loading its model", reason="LOADING")))
        elif self.inference.version < self.step:
            self.inference.version = self.step
        else:
            outcome.error.CopyFrom(to_status(UnavailableError("it has that version")))
        return response


@pytest.fixture
async def one() -> AsyncIterator[One]:
    async with serving_fakes() as fakes:
        worker = ComingBack(fakes.addresses["inference"][0])
        found = One(worker, fakes.inference[0])
        await found.replicas.start()
        yield found
        await found.replicas.close()
        channel: Any = await worker.channel()
        await channel.close(None)


async def test_a_push_waits_for_the_only_replica_to_come_back(one: One) -> None:
    one.worker.up.clear()
    one.inference.restart()
    one.replicas.doubt(one.replicas.all[0], one.replicas.all[0].stub)
    one.step = 1
    pushing = asyncio.create_task(one.replicas.push())
    await asyncio.sleep(0.1)
    assert not pushing.done()
    one.worker.up.set()
    async with asyncio.timeout(PATIENCE):
        assert (await pushing).version == 1
    assert one.inference.version == 1


async def test_a_replica_that_died_unseen_is_given_the_time_to_load(one: One) -> None:
    one.worker.up.clear()
    one.inference.restart()
    one.away, one.step = True, 1
    pushing = asyncio.create_task(one.replicas.push())
    await until(lambda: one.replicas.all[0].stub is None)  # it gets no traffic meanwhile
    one.away = False
    one.worker.up.set()
    async with asyncio.timeout(PATIENCE):
        assert (await pushing).num_replicas == 1
    assert one.inference.version == 1


async def test_a_replica_has_the_trainers_base_before_its_weights_and_its_first_traffic() -> None:
    async with serving_fakes() as fakes:
        worker = ComingBack(fakes.addresses["inference"][0])
        one = One(worker, fakes.inference[0])
        one.base_id = "job-1"
        await one.replicas.start()
        assert (one.inference.base_id, one.inference.version) == ("job-1", 0)
        one.inference.restart()
        one.step = 4
        one.replicas.doubt(one.replicas.all[0], one.replicas.all[0].stub)
        async with asyncio.timeout(PATIENCE), one.replicas.lease(1):
            assert (one.inference.base_id, one.inference.version) == ("job-1", 4)
        await one.replicas.close()
        channel: Any = await worker.channel()
        await channel.close(None)


async def test_a_replica_that_restarted_unseen_and_lost_its_base_is_brought_back_in_a_push() -> None:
    async with serving_fakes() as fakes:
        worker = ComingBack(fakes.addresses["inference"][0])
        one = One(worker, fakes.inference[0])
        one.base_id = "job-1"
        await one.replicas.start()
        one.inference.restart()
        one.step = 1
        async with asyncio.timeout(PATIENCE):
            assert (await one.replicas.push()).num_replicas == 1
        assert (one.inference.base_id, one.inference.version) == ("job-1", 1)
        await one.replicas.close()
        channel: Any = await worker.channel()
        await channel.close(None)


async def test_a_replica_with_the_base_of_another_job_is_refused(one: One) -> None:
    one.inference.base_id = "another-job"
    one.replicas.doubt(one.replicas.all[0], one.replicas.all[0].stub)
    with pytest.raises(ReplicasLostError, match=r"has been given the base another-job, .* restart the replica"):
        async with asyncio.timeout(PATIENCE), one.replicas.lease(1):
            pass


class Moving(One):
    """A trainer that has done one more step whenever its weights were pushed."""

    async def push(self, targets: Sequence[str]) -> trainer_pb2.PushWeightsResponse:
        response = await super().push(targets)
        self.step += 1
        return response


@pytest.mark.parametrize("trainer", [One, Moving])
async def test_a_replica_that_serves_nothing_until_it_is_pushed_is_not_waited_for(trainer: type[One]) -> None:
    """Its last commit failed, or it has just started in a pod: it reports NOT_SERVING, and can be given weights."""
    inference = FakeInference(Hooks())
    confirmed: list[int] = []

    class Updates(weights_pb2_grpc.WeightUpdateServiceServicer):
        async def ConfirmWeights(self, request: weights_pb2.ConfirmWeightsRequest, context: object) -> Empty:
            assert request.version == inference.version
            confirmed.append(request.version)
            return Empty()

    def register(server: RpcServer) -> None:
        add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
        server.add(add, inference, "surogate.v1.InferenceService", serving=False)
        server.add(weights_pb2_grpc.add_WeightUpdateServiceServicer_to_server, Updates(), UPDATES)

    async with serving(register) as server:
        worker = StaticWorker("inference", 0, server.address, ClientSecurity(), 2 * PATIENCE)
        source = trainer(ComingBack(server.address), inference)
        source.step = 2
        replicas = Replicas([worker], source)
        async with asyncio.timeout(PATIENCE):
            await replicas.start()
        assert (inference.version, confirmed) == (2, [2])
        await replicas.close()
        await worker.close()
