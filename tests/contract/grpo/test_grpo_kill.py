"""The orchestrator dies at some call, another one goes on: the ledger must end as if nothing had happened."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import Connection, event
from sqlalchemy.exc import OperationalError

from orchestrator_svc.grpo import ledger
from orchestrator_svc.jobs import context
from orchestrator_svc.jobstore.database import StoreUnavailableError
from tests.helpers.grpo.grpo_job import Rows, grpo_job, run_killed_at

CALLS = 70
"""Calls of an undisturbed run, more or less."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, int]:
    """What the ledger says, and the final weights, when nothing goes wrong."""

    async def run() -> tuple[Rows, int]:
        folder = tmp_path_factory.mktemp("undisturbed")
        async with grpo_job(folder, replicas=2, checkpoint_interval=2, evaluate=2) as (job, fakes):
            await job.run()
            assert abs(CALLS - fakes.hooks.total) < 6
            return await job.rows(), fakes.trainer.history[-1][1]

    return asyncio.run(run())


@pytest.mark.parametrize("everything_dies", [False, True], ids=["orchestrator alone", "all services"])
@pytest.mark.parametrize("call", range(1, CALLS, 4))
async def test_a_killed_run_ends_like_an_undisturbed_one(
    tmp_path: Path, undisturbed: tuple[Rows, int], call: int, everything_dies: bool
) -> None:
    rows, weights = undisturbed
    async with grpo_job(tmp_path / "killed", replicas=2, checkpoint_interval=2, evaluate=2) as (job, fakes):
        if await run_killed_at(job, fakes, call):
            if everything_dies:
                fakes.trainer.restart()
                for replica in fakes.inference:
                    replica.restart()
            await job.run()

        assert await job.rows() == rows
        assert all(row.state == "trained" for row in await job.draws())
        # Every training of a step, replays included, gave the same weights.
        assert len(set(fakes.trainer.history)) == 4
        assert fakes.trainer.history[-1] == (4, weights)
        events = [event.step_completed for event in await job.events() if event.HasField("step_completed")]
        assert [event.step for event in events if not event.replayed] == [1, 2, 3, 4]
        evaluated = [
            event.evaluation_completed.step for event in await job.events() if event.HasField("evaluation_completed")
        ]
        assert evaluated == [0, 2, 4]


@pytest.mark.parametrize("call", range(6, CALLS, 20))
async def test_a_run_that_its_store_is_lost_to_is_gone_on_with(
    tmp_path: Path, undisturbed: tuple[Rows, int], monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """For longer than a job waits: it is let go of, and neither its draws nor the trainer's session are ended."""
    for module in (context, ledger):
        monkeypatch.setattr(module, "JOB_PATIENCE", 0.0)
    rows, weights = undisturbed
    away = False

    def begin(_: Connection) -> None:
        if away:
            raise OperationalError("BEGIN", {}, ConnectionError("the connection is lost"))

    async def lose(_: str) -> None:
        nonlocal away
        away = away or fakes.hooks.total == call

    async with grpo_job(tmp_path / "lost", replicas=2, checkpoint_interval=2, evaluate=2) as (job, fakes):
        event.listen(job.database.engine, "begin", begin)
        fakes.hooks.each = lose
        with pytest.raises(StoreUnavailableError):
            await job.run()
        away = False
        sessions = fakes.hooks.calls["CreateSession"]
        await job.run()

        assert fakes.hooks.calls["CreateSession"] == max(sessions, 1), "the session was kept"
        assert await job.rows() == rows
        assert all(row.state == "trained" for row in await job.draws())
        assert fakes.trainer.history[-1] == (4, weights)
        assert len(fakes.trainer.history) == 4


@pytest.mark.parametrize("call", range(4, 40, 5))
async def test_with_generation_ahead_every_prompt_reaches_one_end(tmp_path: Path, call: int) -> None:
    async with grpo_job(tmp_path, replicas=2, max_async_level=2, refill_rounds=2) as (job, fakes):
        if await run_killed_at(job, fakes, call):
            fakes.trainer.restart()
            await job.run()

        draws = await job.draws()
        assert [row.ordinal for row in draws] == list(range(len(draws)))
        assert all(row.state in ("trained", "dropped") for row in draws)
        assert [len(prompts) for _, prompts in await job.rows()] == [2] * 4
        assert len(set(fakes.trainer.history)) == 4


async def test_steps_behind_the_checkpoint_are_replayed_from_the_ledger(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, max_steps=5, checkpoint_interval=2) as (job, fakes):

        async def die(_: object) -> None:
            if not died:
                died.append(True)
                fakes.trainer.restart()

        async def at_step(header: object) -> None:
            if getattr(header, "step", 0) == 4:
                await die(header)

        died: list[bool] = []
        fakes.hooks.on["TrainStep"] = at_step
        await job.run()

        assert [step for step, _ in fakes.trainer.history] == [1, 2, 3, 3, 4, 5]
        assert len(set(fakes.trainer.history)) == 5
        replayed = [event.step_completed for event in await job.events() if event.HasField("step_completed")]
        assert [(event.step, event.replayed) for event in replayed] == [
            (1, False),
            (2, False),
            (3, False),
            (3, True),
            (4, False),
            (5, False),
        ]
