"""A minute without the API server, at a twentieth of the time: no job fails, no pod comes twice, and all goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="needs the extra `kubernetes`")

from orchestrator_svc.jobs import runner
from orchestrator_svc.launchers.kubernetes import api, troubles, worker
from surogate.v1 import job_pb2
from tests.contract.kubernetes.test_kubernetes_grpo import grpo_config
from tests.helpers.cluster.kube import Cluster
from tests.helpers.cluster.kube_jobs import GrpoPods, TrainerPods, reinforcing_on, training_on
from tests.helpers.cluster.kube_server import ApiServer
from tests.helpers.orchestrator import Orchestrator, sft_config

State = job_pb2.Job
FASTER = 20
OUTAGE_SECONDS = 60 / FASTER
LEFT = ("jobs", "pods", "services", "configmaps")
CLOCKS = {
    api: ("CALL_SECONDS", "WATCH_SECONDS", "_WATCH_SILENCE", "_GRACE", "_FIRST_PAUSE", "_MAX_PAUSE"),
    worker: ("_LOOK_SECONDS", "_SAVE_SECONDS"),
    troubles: ("NO_POD_SECONDS", "SET_UP_SECONDS"),
    runner: ("SWEEP_SECONDS",),
}

SLOW = pytest.mark.slow

Outage = Callable[[ApiServer], AbstractAsyncContextManager[None]]


@pytest.fixture(autouse=True)
def compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wait for the API server takes a twentieth of its time."""
    for module, names in CLOCKS.items():
        for name in names:
            seconds = getattr(module, name) / FASTER
            monkeypatch.setattr(module, name, max(1, round(seconds)) if name == "WATCH_SECONDS" else seconds)


@asynccontextmanager
async def cut(server: ApiServer) -> AsyncIterator[None]:
    """Every connection breaks."""
    server.down = True
    server.cut()
    yield
    server.down = False


@asynccontextmanager
async def refused(server: ApiServer) -> AsyncIterator[None]:
    """Nothing listens."""
    await server.refuse()
    async with cut(server):
        yield
    await server.listen()


@asynccontextmanager
async def hanging(server: ApiServer) -> AsyncIterator[None]:
    """Calls are taken and not answered; open watches stay silent. What was asked for is done late."""
    server.hangs = True
    yield
    server.hangs = False


@asynccontextmanager
async def busy(server: ApiServer) -> AsyncIterator[None]:
    """Every call is told to come again later, and watches have expired when they do."""
    server.throttled, server.retry_after = 1_000_000, 0.2
    server.cut()
    yield
    server.expire()
    server.throttled, server.retry_after = 0, None


@pytest.mark.parametrize("outage", [pytest.param(cut, marks=SLOW), pytest.param(refused, marks=SLOW), hanging, busy])
async def test_a_minute_without_the_api_server_costs_no_job(outage: Outage, tmp_path: Path) -> None:
    pods = TrainerPods(0.05)
    settings: dict[str, Any] = {"max_running_jobs": 4, "api_patience": 300 / FASTER}
    async with training_on(tmp_path, pods, **settings) as (orchestrator, cluster):
        steps = {"runs": 140, "crashes": 140, "ends": 30}
        for name, count in steps.items():
            await create(orchestrator, name, count)
        for name in steps:
            await orchestrator.until_step(f"jobs/{name}", 5)
        async with outage(cluster.api):
            await cluster.fail(pod_of(cluster, "crashes"), 1)
            await create(orchestrator, "comes", 5)
            await asyncio.sleep(OUTAGE_SECONDS)
            assert not (await orchestrator.get("jobs/comes")).step, "it cannot have a pod yet"
            assert (await orchestrator.get("jobs/runs")).step > 20, "training goes on meanwhile"
        for name in [*steps, "comes"]:
            ended = await orchestrator.ended(f"jobs/{name}")
            assert ended.state == State.STATE_SUCCEEDED, (name, ended.status_message)
        assert len(pods.trainers) == 5, "one each, and one more for the one that crashed"
        await cluster.until(lambda: not any(cluster.api.objects[plural] for plural in LEFT))


@pytest.mark.parametrize("outage", [pytest.param(refused, marks=SLOW), hanging])
async def test_a_replica_that_dies_while_the_api_server_is_away_is_replaced_after_it(
    outage: Outage, tmp_path: Path
) -> None:
    pods = GrpoPods(seconds=0.02)
    async with reinforcing_on(tmp_path, pods, api_patience=300 / FASTER) as (orchestrator, cluster, model):
        job = await orchestrator.create(grpo_config(model, replicas=2, max_steps=2000), job_id="rl")
        await orchestrator.until_step(job.name, 2)
        async with outage(cluster.api):
            await cluster.fail(cluster.pod("inference", 1), 137)
            step = (await orchestrator.get(job.name)).step
            await asyncio.sleep(OUTAGE_SECONDS)
            assert (await orchestrator.get(job.name)).step > step, "the other replica serves meanwhile"
        new = await cluster.until(lambda: len(pods.replicas) == 3 and list(pods.replicas.values())[2])
        await cluster.until(lambda: new.served)
        assert (new.version >= 2, len(pods.trainers)) == (True, 1)
        await orchestrator.cancel(job.name)
        await orchestrator.ended(job.name)
        await cluster.until(lambda: not any(cluster.api.objects[plural] for plural in LEFT))


async def create(orchestrator: Orchestrator, name: str, steps: int) -> None:
    config = sft_config(max_steps=steps, save_steps=10, output_dir=f"out-{name}")
    await orchestrator.create(config, job_id=name)


def pod_of(cluster: Cluster, job: str) -> dict[str, Any]:
    [found] = [pod for pod in cluster.pods if pod["metadata"]["labels"]["surogate.dev/job"] == job]
    return found
