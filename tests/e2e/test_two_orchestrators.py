"""Two orchestrator processes on one PostgreSQL server and one cluster: no job runs twice, a dead one is succeeded."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
import pytest_asyncio

pytest.importorskip("kubernetes", reason="needs the extra `kubernetes`")

from surogate.process import ServiceProcess
from tests.e2e.test_jobs_processes import orchestrator_process, steps_of
from tests.helpers.cluster.kube import Cluster, kubernetes, write_kubeconfig, write_templates
from tests.helpers.cluster.kube_jobs import TrainerPods
from tests.helpers.orchestrator import Orchestrator, State, sft_config
from tests.helpers.postgres import Postgres

pytestmark = pytest.mark.slow

JOBS, STEPS = 4, 120
LEASE_SECONDS = 6.0
LEFT = ("jobs", "pods", "services", "configmaps")


@dataclass
class Setup:
    """The cluster, its trainers, the database, and the two orchestrators."""

    cluster: Cluster
    pods: TrainerPods
    url: str
    orchestrators: list[tuple[Orchestrator, ServiceProcess]]

    def sql(self, query: str, *values: object) -> list[tuple[str, ...]]:
        with psycopg.connect(self.url.replace("+psycopg", ""), autocommit=True) as connection:
            done = connection.execute(query, values)
            return list(done.fetchall()) if done.description else []

    def owned_by(self, process: ServiceProcess) -> list[str]:
        """Jobs that the store says a process runs."""
        pid = f"%/{process.process.pid}/%"
        return [row[0] for row in self.sql("SELECT job_id FROM jobs WHERE owner LIKE %s", pid)]

    async def start_jobs(self) -> list[str]:
        """Jobs that have begun to train, two in each orchestrator."""
        client = self.orchestrators[0][0]
        names = [
            (await client.create(sft_config(max_steps=STEPS, output_dir=f"out-{i}"), job_id=f"job-{i}")).name
            for i in range(JOBS)
        ]
        for name in names:
            await client.until_step(name, 2)
        assert [len(self.owned_by(process)) for _, process in self.orchestrators] == [2, 2]
        return names

    async def check_ends(self, client: Orchestrator, names: list[str]) -> None:
        """Every job ends well, with each step once, in the pod that it began with; nothing of it is left."""
        for name in names:
            history = await client.history(name)
            ended = await client.get(name)
            assert ended.state == State.STATE_SUCCEEDED, ended.status_message
            assert steps_of(history, replayed=False) == list(range(1, STEPS + 1))
            assert not steps_of(history, replayed=True)
        posts = [one for one in self.cluster.api.requests if (one.method, one.plural) == ("POST", "jobs")]
        assert len(posts) == len(self.pods.trainers) == JOBS
        await self.cluster.until(lambda: not any(self.cluster.api.objects[plural] for plural in LEFT))


@pytest_asyncio.fixture
async def setup(postgres: Postgres, tmp_path: Path) -> AsyncIterator[Setup]:
    pods, url = TrainerPods(0.1), postgres.new_database()
    async with kubernetes(pods) as cluster, AsyncExitStack() as stack:
        flags = {
            "launcher": "kubernetes",
            "kubeconfig": str(write_kubeconfig(tmp_path / "kubeconfig", cluster.api.url)),
            "pod-templates": str(write_templates(tmp_path / "templates")),
            "store-url": url,
            "lease-seconds": str(LEASE_SECONDS),
            "max-running-jobs": str(JOBS // 2),
        }
        starting = [orchestrator_process(tmp_path, log=f"{name}.log", **flags) for name in ("a", "b")]
        processes = await asyncio.gather(*(stack.enter_async_context(each) for each in starting))
        yield Setup(cluster, pods, url, processes)


async def test_jobs_are_shared_and_each_runs_once(setup: Setup) -> None:
    names = await setup.start_jobs()
    await setup.check_ends(setup.orchestrators[1][0], names)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same-host", "other-host"])
async def test_after_a_kill_the_other_one_goes_on_in_the_same_pods(setup: Setup, elsewhere: bool) -> None:
    names = await setup.start_jobs()
    (_, killed), (survivor, alive) = setup.orchestrators
    orphans = setup.owned_by(killed)
    killed.process.send_signal(signal.SIGKILL)
    await killed.process.wait()
    if elsewhere:  # a survivor on another host cannot see that the process is dead: the lease has to run out
        setup.sql("UPDATE jobs SET owner = 'elsewhere/1/1/1/1' WHERE job_id = ANY(%s)", orphans)
    assert set(setup.owned_by(alive)) == {f"job-{i}" for i in range(JOBS)} - set(orphans)
    await setup.check_ends(survivor, names)
