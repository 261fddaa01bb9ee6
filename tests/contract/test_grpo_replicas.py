"""Pushes while replicas come and go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from orchestrator_svc.grpo.replicas import Replicas
from orchestrator_svc.launchers.base import READY_TIMEOUT
from surogate.errors import UnavailableError
from surogate.rpc.status import to_status
from surogate.v1 import trainer_pb2
from tests.helpers.grpo_fakes import FakeInference, serving_fakes
from tests.helpers.grpo_job import FakeWorker


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
        self.version = 0
        self.away = False
        self.replicas = Replicas([worker], self.push, current=lambda: self.version)

    async def push(self, targets: Sequence[str]) -> trainer_pb2.PushWeightsResponse:
        assert targets == [self.worker.address]
        response = trainer_pb2.PushWeightsResponse(version=self.version)
        outcome = response.replicas.add(target=targets[0])
        if self.away:
            outcome.error.CopyFrom(to_status(UnavailableError("it is loading its model", reason="LOADING")))
        elif self.inference.version < self.version:
            self.inference.version = self.version
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
    one.version = 1
    pushing = asyncio.create_task(one.replicas.push())
    await asyncio.sleep(0.1)
    assert not pushing.done()
    one.worker.up.set()
    async with asyncio.timeout(10):
        assert (await pushing).version == 1
    assert one.inference.version == 1


async def test_a_replica_that_died_unseen_is_given_the_time_to_load(one: One) -> None:
    one.worker.up.clear()
    one.inference.restart()
    one.away, one.version = True, 1
    pushing = asyncio.create_task(one.replicas.push())
    await asyncio.sleep(0.1)
    assert one.replicas.all[0].stub is None, "it gets no traffic meanwhile"
    one.away = False
    one.worker.up.set()
    async with asyncio.timeout(10):
        assert (await pushing).num_replicas == 1
    assert one.inference.version == 1
