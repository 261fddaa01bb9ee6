"""PostgreSQL as the job store: several orchestrators on it, restarts of it, connections that are cut."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import OperationalError

from orchestrator_svc.create_tables import create_tables
from orchestrator_svc.jobs.context import JobContext
from orchestrator_svc.jobstore import store
from orchestrator_svc.jobstore.database import Database, StoreUnavailableError
from orchestrator_svc.launchers.base import WorkerPool
from surogate.errors import ConfigError, SurogateError
from surogate.v1 import job_pb2
from tests.helpers.grpo.grpo_fakes import serving_fakes
from tests.helpers.grpo.grpo_job import OWNER, GrpoJob, settings_for, write_tokenizer
from tests.helpers.grpo.pools import EmptyLauncher
from tests.helpers.orchestrator import Orchestrator, State, orchestrating, sft_config
from tests.helpers.postgres import Postgres

SOON = {"lease_seconds": 3.0}


class Steps:
    """A job of many quick steps; who did which is kept."""

    def __init__(self, name: str, count: int = 30) -> None:
        self.name = name
        self.count = count
        self.done: list[int] = []
        self.runs = 0
        self.begins_with: asyncio.Barrier | None = None

    async def run(self, ctx: JobContext, pool: WorkerPool) -> None:
        """Goes on where the store says that the job is."""
        self.runs += 1
        await ctx.running()
        if self.begins_with is not None and self.runs == 1:
            await self.begins_with.wait()
        for step in range(ctx.step + 1, self.count + 1):
            await ctx.emit(job_pb2.StepCompleted(step=step, max_steps=self.count))
            self.done.append(step)
            await asyncio.sleep(0.05)


def orchestrator(folder: Path, url: str, steps: Steps, **changes: Any) -> Any:
    """An orchestrator whose name tells nothing of its process: as one on another host."""
    settings = {"store_url": url, "identity": f"{steps.name}/", **SOON, **changes}
    return orchestrating(folder, {"sft": steps.run}, EmptyLauncher(), **settings)


async def steps_of(one: Orchestrator, name: str) -> list[int]:
    """Steps of the job's history."""
    return [e.step_completed.step for e in await one.history(name) if e.HasField("step_completed")]


async def test_one_of_two_orchestrators_runs_a_job(postgres: Postgres, tmp_path: Path) -> None:
    url, a, b = postgres.new_database(), Steps("a", 5), Steps("b", 5)
    both = asyncio.Barrier(2)
    a.begins_with = b.begins_with = both  # the first job of each: none has done all before the other has looked
    keeps = {"lease_seconds": 6.0, "max_running_jobs": 1}
    async with orchestrator(tmp_path, url, a, **keeps) as first, orchestrator(tmp_path, url, b, **keeps) as second:
        names = [(await first.create(sft_config(output_dir=f"out-{i}"))).name for i in range(6)]
        for name in names:
            assert await steps_of(second, name) == [1, 2, 3, 4, 5]
            assert (await first.get(name)).state == State.STATE_SUCCEEDED
    assert a.runs + b.runs == 6
    assert a.runs
    assert b.runs


async def test_the_other_one_takes_over_after_a_death(postgres: Postgres, tmp_path: Path) -> None:
    url, a, b = postgres.new_database(), Steps("a"), Steps("b")
    async with orchestrator(tmp_path, url, b, max_running_jobs=1) as second:
        assert second.runner is not None
        await second.runner.stop()  # not yet: the first is to begin
        async with orchestrator(tmp_path, url, a) as first:
            assert first.runner is not None
            job = await first.create(sft_config())
            await first.until_step(job.name, 3)
            dead = first.runner
            tasks = [*dead._tasks, *(task for _, task in dead._running.values())]
            for task in tasks:
                task.cancel()  # as a host that is gone: its lease is not given back
            await asyncio.wait(tasks)
            reached = (await first.get(job.name)).step
            second.runner.start()
            assert await steps_of(second, job.name) == list(range(1, 31))
            assert b.done == list(range(reached + 1, 31)), "the second goes on where the first was"
            dead._running.clear()


async def test_two_that_start_at_once_make_the_tables_once(postgres: Postgres) -> None:
    url = postgres.new_database()
    databases = [Database.open(url) for _ in range(4)]
    await asyncio.gather(*(database.write(create_tables) for database in databases))
    await asyncio.gather(*(database.close() for database in databases))


async def test_jobs_that_come_to_several_orchestrators_at_once_share_no_folder(
    postgres: Postgres, tmp_path: Path
) -> None:
    url, a, b = postgres.new_database(), Steps("a"), Steps("b")
    async with orchestrator(tmp_path, url, a) as first, orchestrator(tmp_path, url, b) as second:
        created = [one.create(sft_config(output_dir="same")) for one in (first, second) * 4]
        outcomes = await asyncio.gather(*created, return_exceptions=True)
        assert len([one for one in outcomes if isinstance(one, job_pb2.Job)]) == 1
        assert all("is being written by" in str(one) for one in outcomes if isinstance(one, SurogateError))


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_job_outlives_a_restart_of_the_server(postgres: Postgres, tmp_path: Path, mode: str) -> None:
    url, a = postgres.new_database(), Steps("a")
    async with orchestrator(tmp_path, url, a, lease_seconds=60.0) as one:
        job = await one.create(sft_config())
        await one.until_step(job.name, 3)
        await asyncio.to_thread(postgres.stop, mode)
        await asyncio.sleep(1.0)
        await asyncio.to_thread(postgres.start)
        assert await again(one, job.name) == list(range(1, 31))
        assert (await one.get(job.name)).state == State.STATE_SUCCEEDED
    assert a.runs == 1, "its workers were not given up"
    assert a.done == list(range(1, 31))


async def test_cut_connections_cost_nothing(postgres: Postgres, tmp_path: Path) -> None:
    url, a = postgres.new_database(), Steps("a")
    async with orchestrator(tmp_path, url, a, lease_seconds=10.0) as one:
        job = await one.create(sft_config())
        cut = 0
        while (await once(one, job.name)).state not in (State.STATE_SUCCEEDED, State.STATE_FAILED):
            cut += await asyncio.to_thread(postgres.disconnect_all)
            await asyncio.sleep(0.3)
        assert (await one.get(job.name)).state == State.STATE_SUCCEEDED, (await one.get(job.name)).status_message
        assert cut > 3
    assert a.done == list(range(1, 31))


@pytest.mark.parametrize("committed", [True, False])
async def test_a_commit_whose_answer_was_lost_takes_effect_once(postgres: Postgres, committed: bool) -> None:
    database = Database.open(postgres.new_database())
    await database.write(lambda c: c.execute(text("CREATE TABLE written (number INTEGER)")))
    lost = asyncio.Event()

    def lose(connection: Connection) -> None:
        """Loses the connection when COMMIT was sent, or before the server has seen it."""
        if not lost.is_set():
            lost.set()
            if committed:
                connection.connection.driver_connection.commit()  # type: ignore[union-attr]
            raise OperationalError("COMMIT", {}, psycopg.OperationalError("the connection is lost"))

    event.listen(database.engine, "commit", lose)
    await database.write(lambda c: c.execute(text("INSERT INTO written VALUES (1)")).rowcount, patience=10.0)
    rows = await database.read(lambda c: c.scalars(text("SELECT number FROM written")).all())
    assert lost.is_set()
    assert rows == [1]
    await database.close()


async def test_a_grpo_job_on_it(postgres: Postgres, tmp_path: Path) -> None:
    async with serving_fakes(2) as fakes:
        job = GrpoJob(
            tmp_path / "job", fakes, settings_for(write_tokenizer(tmp_path / "model")), postgres.new_database()
        )
        await job.create()
        await job.run()
        assert [step for step, _ in fakes.trainer.history] == [1, 2, 3, 4]
        assert all(row.state == "trained" for row in await job.draws())
        await job.database.write(lambda c: store.end(c, "job", OWNER, State.STATE_SUCCEEDED, "done"))
        await job.database.write(lambda c: store.forget(c, "job"))
        assert await job.draws() == []
        await job.close()


async def test_a_server_that_is_not_there_names_the_setting_and_no_password() -> None:
    url = "postgresql+psycopg://me:hidden@127.0.0.1:1/x"  # pragma: allowlist secret
    with pytest.raises(ConfigError, match="store_url: cannot use") as caught:
        Database.open(url)
    assert "hidden" not in str(caught.value)


async def test_a_write_is_told_when_the_server_stays_away(postgres: Postgres) -> None:
    database = Database.open(postgres.new_database())
    await database.write(create_tables)
    await asyncio.to_thread(postgres.stop)
    try:
        started = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            await database.write(lambda c: store.count_by_state(c), patience=0.5)
        assert time.monotonic() - started >= 0.3, "it was tried again"
    finally:
        await asyncio.to_thread(postgres.start)
    assert (await database.write(lambda c: store.count_by_state(c)))["QUEUED"] == 0
    await database.close()


async def again(one: Orchestrator, name: str) -> list[int]:
    """Steps of the job, watched anew whenever the store was away."""
    while True:
        try:
            return await steps_of(one, name)
        except SurogateError as error:
            assert error.reason == StoreUnavailableError.reason, error
            await asyncio.sleep(0.1)


async def once(one: Orchestrator, name: str) -> job_pb2.Job:
    """The job, asked for again while the store is away."""
    while True:
        try:
            return await one.get(name)
        except SurogateError as error:
            assert error.reason == StoreUnavailableError.reason, error
