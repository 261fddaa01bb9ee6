"""The n-th transaction of a job's life is lost: with or without effect, alone or with the server for seconds.

Whatever n, the job ends as an undisturbed one, with the same history, on the workers that it had.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import Row

from orchestrator_svc.grpo.job import run_with
from orchestrator_svc.jobs.context import JobContext
from orchestrator_svc.jobstore import store
from orchestrator_svc.jobstore.database import Database
from orchestrator_svc.jobstore.journal import read_events
from orchestrator_svc.jobstore.messages import ENDED
from orchestrator_svc.launchers.base import WorkerPool
from surogate.errors import UnavailableError
from surogate.rollouts import step_files
from surogate.telemetry.metrics import REGISTRY
from surogate.v1 import job_pb2
from tests.helpers.grpo.grpo_fakes import serving_fakes
from tests.helpers.grpo.grpo_job import FakePool, GrpoJob, Rows, job_config, settings_for, write_tokenizer
from tests.helpers.grpo.pools import EmptyLauncher
from tests.helpers.orchestrator import Orchestrator, State, orchestrating, serving_fake_trainer, sft_config
from tests.helpers.postgres import Postgres
from tests.helpers.store_faults import Fault, StoreFaults

T = TypeVar("T")
OUTAGE_SECONDS = 2.0
LEASE_SECONDS = 6.0

History = list[tuple[str, str]]


@dataclass
class Told:
    """What is to be the same whatever was lost."""

    state: str = ""
    states: list[str] = field(default_factory=list)
    """One after the other. What it says of itself within one depends on what of the trainer's events comes together."""
    history: History = field(default_factory=list)
    """All other events."""
    trained: list[Any] = field(default_factory=list)
    rows: Rows = field(default_factory=list)
    starts: int = 0
    """How often workers were asked to begin."""
    left: Any = None
    """What the trainer still holds."""
    files: dict[str, list[int]] = field(default_factory=dict)
    """Steps in the files that it writes as it goes, line by line."""
    counted: float = 0.0
    """Ends of jobs in the metrics of the process."""


async def sft_job(folder: Path, url: str, at: int, fault: Fault) -> tuple[Told, StoreFaults]:
    """An SFT job on a fake trainer."""
    counted = _counted("sft")
    async with serving_fake_trainer(step_seconds=0.01) as (address, trainer):
        static = {"launcher_name": "static", "trainer_address": address, "worker_wait": 60.0}
        async with _orchestrator(folder, url, **static) as one, _looking(url) as seen:
            assert one.database is not None
            faults = StoreFaults(one.database, at, fault, OUTAGE_SECONDS)
            await patiently(lambda: one.create(sft_config("warns"), job_id="job", request_id="once"))
            told = await _ended(seen)
            await _until(lambda: one.runner is not None and not one.runner.running)
            await _until(lambda: not trainer.sessions)
    told.starts, told.left = len(trainer.requests), list(trainer.sessions)
    told.files, told.counted = await _files(folder), _counted("sft") - counted
    return told, faults


async def grpo_job(folder: Path, url: str, at: int, fault: Fault) -> tuple[Told, StoreFaults]:
    """A GRPO job on fakes, with checkpoints and evaluations."""
    starts, counted = [], _counted("grpo")
    async with serving_fakes(2) as fakes:
        settings = settings_for(write_tokenizer(folder / "model"), item_timeout=60.0, checkpoint_interval=2, evaluate=2)
        settings = replace(settings, rollout_bytes=1 << 30)

        async def run(ctx: JobContext, _: WorkerPool) -> None:
            starts.append(ctx.resumed)
            pool = FakePool(fakes)
            try:
                await run_with(ctx, pool, settings)
            finally:
                await pool.stop()

        async with _orchestrator(folder, url, {"grpo": run}, EmptyLauncher()) as one, _looking(url) as seen:
            assert one.database is not None
            faults = StoreFaults(one.database, at, fault, OUTAGE_SECONDS)
            config = job_config(settings.model, output_dir="out")
            await patiently(lambda: one.create(config, job_id="job", request_id="once"))
            told = await _ended(seen)
            await _until(lambda: one.runner is not None and not one.runner.running)
        ledger = GrpoJob(folder / "ledger", fakes, settings, url)
        told.rows = await ledger.rows()
        assert all(row.state == "trained" for row in await ledger.draws())
        await ledger.close()
    told.trained, told.starts, told.left = fakes.trainer.history, len(starts), fakes.trainer.session
    told.files, told.counted = await _files(folder), _counted("grpo") - counted
    return told, faults


Run = Callable[[Path, str, int, Fault], Awaitable[tuple[Told, StoreFaults]]]
RUNS: dict[str, Run] = {"sft": sft_job, "grpo": grpo_job}
_undisturbed: dict[str, Told] = {}


async def undisturbed(kind: str, folder: Path, postgres: Postgres) -> Told:
    """What a job tells when nothing is lost."""
    if kind not in _undisturbed:
        told, _ = await RUNS[kind](folder / "undisturbed", postgres.new_database(), 0, Fault.CUT_BEFORE)
        assert told.state == "STATE_SUCCEEDED"
        assert told.starts == 1
        assert not told.left
        assert told.files["metrics.jsonl"] == list(range(1, len(told.files["metrics.jsonl"]) + 1))
        assert told.counted == 1
        _undisturbed[kind] = told
    return _undisturbed[kind]


async def check(kind: str, at: int, fault: Fault, folder: Path, postgres: Postgres) -> bool:
    """Runs a job that loses transaction `at`; whether it had so many."""
    expected = await undisturbed(kind, folder, postgres)
    told, faults = await RUNS[kind](folder / "job", postgres.new_database(), at, fault)
    assert told == expected, f"{fault}: {at}, {faults.hit}"
    return bool(faults.hit)


@pytest.mark.parametrize("at", [7, 12])
@pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER], ids=["before", "after"])
async def test_an_sft_job_ends_as_if_nothing_had_been_lost(
    postgres: Postgres, tmp_path: Path, fault: Fault, at: int
) -> None:
    assert await check("sft", at, fault, tmp_path, postgres)


@pytest.mark.parametrize("at", [4, 46])
@pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER], ids=["before", "after"])
async def test_a_grpo_job_ends_as_if_nothing_had_been_lost(
    postgres: Postgres, tmp_path: Path, fault: Fault, at: int
) -> None:
    assert await check("grpo", at, fault, tmp_path, postgres)


@pytest.mark.parametrize(("kind", "at"), [("sft", 11), ("grpo", 41)])
async def test_a_job_waits_for_a_server_that_is_away(postgres: Postgres, tmp_path: Path, kind: str, at: int) -> None:
    assert await check(kind, at, Fault.OUTAGE, tmp_path, postgres)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", list(Fault), ids=["before", "after", "outage"])
@pytest.mark.parametrize(("kind", "stride"), [("sft", 1), ("grpo", 3)], ids=list(RUNS))
async def test_whichever_transaction_is_lost(
    postgres: Postgres, tmp_path: Path, kind: str, stride: int, fault: Fault
) -> None:
    at = 1
    while await check(kind, at, fault, tmp_path / str(at), postgres):
        at += 5 * stride if fault == Fault.OUTAGE else stride


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """What a call answers, made again whenever the store was away."""
    while True:
        try:
            return await call()
        except UnavailableError:
            await asyncio.sleep(0.1)


@asynccontextmanager
async def _orchestrator(folder: Path, url: str, *given: Any, **settings: Any) -> AsyncIterator[Orchestrator]:
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    async with orchestrating(folder, *given, store_url=url, lease_seconds=LEASE_SECONDS, **settings) as one:
        yield one


@asynccontextmanager
async def _looking(url: str) -> AsyncIterator[Database]:
    """Connections of the test's own: what it looks at is not counted, and not lost."""
    database = Database.open(url)
    try:
        yield database
    finally:
        await database.close()


async def _ended(seen: Database) -> Told:
    """Waits for the job's end, for as long as a job may take on a slow machine."""
    async with asyncio.timeout(120):
        while (row := await _row(seen)) is None or row.state not in ENDED:  # noqa: ASYNC110 - it is not to be told
            await asyncio.sleep(0.05)
    events = await seen.read(lambda c: read_events(c, "job", 0, 10_000))
    told = Told(State.State.Name(row.state))
    told.states = [state for state, _ in groupby(_state(event) for event in events if event.HasField("state_changed"))]
    told.history = [_said(event) for event in events if not event.HasField("state_changed")]
    return told


async def _files(folder: Path) -> dict[str, list[int]]:
    def read() -> dict[str, list[int]]:
        found = {
            file.name: [int(json.loads(line)["step"]) for line in file.read_text().splitlines()]
            for file in sorted((folder / "out").glob("*s.jsonl"))
        }
        return {**found, "rollouts": sorted(step for step, _ in step_files(folder / "out"))}

    return await asyncio.to_thread(read)


def _counted(kind: str) -> float:
    sample = REGISTRY.get_sample_value("surogate_orchestrator_job_ends_total", {"kind": kind, "state": "SUCCEEDED"})
    return sample or 0.0


async def _row(seen: Database) -> Row[Any] | None:
    return await seen.read(lambda c: store.find(c, "job"))


async def _until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not done():  # noqa: ASYNC110 - nothing else tells of it
            await asyncio.sleep(0.02)


def _state(event: job_pb2.JobEvent) -> str:
    return State.State.Name(event.state_changed.state)


def _said(event: job_pb2.JobEvent) -> tuple[str, str]:
    """An event without what differs from run to run: folders, times, speeds."""
    kind = str(event.WhichOneof("event"))
    for part in (event.step_completed, event.evaluation_completed):
        if part.ByteSize():
            part.metrics.clear()
    if kind == "weights_pushed":
        return kind, str(event.weights_pushed.policy_version)
    if kind == "checkpoint_saved":
        return kind, f"{event.checkpoint_saved.step} {event.checkpoint_saved.final}"
    return kind, str(getattr(event, kind))
