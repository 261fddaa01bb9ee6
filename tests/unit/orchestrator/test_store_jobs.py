"""The job store: idempotent creation, pages, events without gaps, leases."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import Connection, func, select

from orchestrator_svc.create_tables import VERSION, create_tables
from orchestrator_svc.jobstore import leases, store
from orchestrator_svc.jobstore.database import Database
from orchestrator_svc.jobstore.identity import is_known_dead, make_identity
from orchestrator_svc.jobstore.journal import LeaseLostError, read_events, record
from orchestrator_svc.jobstore.messages import to_job
from orchestrator_svc.jobstore.schema import events, job_labels, schema_version
from surogate.errors import (
    AlreadyExistsError,
    BusyError,
    ConfigError,
    FailedPreconditionError,
    InvalidInputError,
    NotFoundError,
)
from surogate.v1 import job_pb2

State = job_pb2.Job


@pytest_asyncio.fixture
async def database(store_url: str) -> AsyncIterator[Database]:
    database = Database.open(store_url)
    await database.write(create_tables)
    yield database
    await database.close()


def new_job(job_id: str, **changes: Any) -> store.NewJob:
    values: dict[str, Any] = {
        "job_id": job_id,
        "kind": State.KIND_SFT,
        "config": {"kind": "sft", "train": {"model": "m"}},
        "warnings": [],
        "labels": {},
        "output_dir": f"/out/{job_id}",
        "request_id": "",
        "request_digest": store.digest(job_id),
    }
    return store.NewJob(**{**values, **changes})


async def add(database: Database, job_id: str, **changes: Any) -> Any:
    return await database.write(lambda c: store.create(c, new_job(job_id, **changes), 100))


async def test_a_new_job_is_queued_and_says_so_in_its_first_event(database: Database) -> None:
    row = await add(database, "a", warnings=["key x has no meaning here"], labels={"team": "blue"})
    job = to_job(row)
    assert job.name == "jobs/a"
    assert job.state == State.STATE_QUEUED
    assert dict(job.labels) == {"team": "blue"}
    history = await database.read(lambda c: read_events(c, "a", 0, 10))
    assert [event.sequence for event in history] == [1, 2]
    assert history[0].state_changed.state == State.STATE_QUEUED
    assert history[1].notice.text == "key x has no meaning here"


async def test_a_repeated_request_id_gives_the_same_job(database: Database) -> None:
    first = await add(database, "a", request_id="r", request_digest="d")
    again = await add(database, "b", request_id="r", request_digest="d")
    assert again.job_id == first.job_id == "a"
    with pytest.raises(AlreadyExistsError, match="another configuration") as caught:
        await add(database, "c", request_id="r", request_digest="other")
    assert caught.value.reason == "REQUEST_ID_REUSED"


async def test_what_cannot_be_queued_is_refused(database: Database) -> None:
    await add(database, "a")
    with pytest.raises(AlreadyExistsError, match="jobs/a exists"):
        await add(database, "a", output_dir="/elsewhere")
    with pytest.raises(FailedPreconditionError, match="is being written by jobs/a"):
        await add(database, "b", output_dir="/out/a")
    with pytest.raises(BusyError, match="1 jobs wait already"):
        await database.write(lambda c: store.create(c, new_job("c"), 1))


async def test_pages_are_newest_first_and_complete(database: Database) -> None:
    for index in range(7):
        await add(database, f"job-{index}", labels={"parity": str(index % 2)})
    seen, token = [], ""
    while True:
        rows, token = await database.read(lambda c, t=token: store.list_page(c, page_size=3, page_token=t))
        seen += [row.job_id for row in rows]
        if not token:
            break
    assert seen == [f"job-{index}" for index in reversed(range(7))]
    odd, _ = await database.read(
        lambda c: store.list_page(c, page_size=9, page_token="", labels={"parity": "1"}, states=[State.STATE_QUEUED])
    )
    assert [row.job_id for row in odd] == ["job-5", "job-3", "job-1"]


async def test_page_tokens_belong_to_their_filters(database: Database) -> None:
    for index in range(3):
        await add(database, f"job-{index}")
    _, token = await database.read(lambda c: store.list_page(c, page_size=1, page_token=""))
    with pytest.raises(InvalidInputError, match="other filters"):
        await database.read(lambda c: store.list_page(c, page_size=1, page_token=token, kinds=[State.KIND_PT]))
    with pytest.raises(InvalidInputError, match="not one that this server gave"):
        await database.read(lambda c: store.list_page(c, page_size=1, page_token="xyz"))


async def test_events_change_the_job_with_them(database: Database) -> None:
    await add(database, "a")
    await database.write(lambda c: leases.claim_next(c, "me", 60))
    step = job_pb2.StepCompleted(step=3, max_steps=9, metrics={"loss": 2.0, "lr": float("nan")})
    saved = job_pb2.CheckpointSaved(step=3, path="/out/a/checkpoint-3")
    done = job_pb2.EvaluationCompleted(step=3, environment="validation", metrics={"eval/loss": 2.5})
    await database.write(lambda c: record(c, "a", "me", [step, saved, done]))
    again = job_pb2.StepCompleted(step=2, max_steps=9, metrics={"loss": 2.2}, replayed=True)
    await database.write(lambda c: record(c, "a", "me", [again, job_pb2.Notice()]))
    job = to_job(await database.read(lambda c: store.get(c, "a")))
    assert (job.step, job.max_steps, job.checkpoint) == (3, 9, "/out/a/checkpoint-3")
    assert dict(job.metrics) == {"loss": 2.2, "eval/validation/loss": 2.5}
    history = await database.read(lambda c: read_events(c, "a", 0, 10))
    assert [event.sequence for event in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1].WhichOneof("event") == "notice"


async def test_nothing_is_written_without_the_lease(database: Database) -> None:
    await add(database, "a")
    await database.write(lambda c: leases.claim_next(c, "me", 60))
    with pytest.raises(LeaseLostError):
        await database.write(lambda c: record(c, "a", "you", [job_pb2.Notice(text="mine")]))
    assert len(await database.read(lambda c: read_events(c, "a", 0, 10))) == 1


async def test_an_event_and_a_row_beside_it_are_both_kept_or_neither(database: Database) -> None:
    await add(database, "a")

    def fail(_: object) -> None:
        raise RuntimeError("ledger")

    with pytest.raises(RuntimeError, match="ledger"):
        await database.write(lambda c: record(c, "a", None, [job_pb2.Notice(text="x")], also=fail))
    assert (await database.read(lambda c: store.get(c, "a"))).last_sequence == 1


async def test_jobs_that_ran_are_claimed_before_those_that_wait(database: Database) -> None:
    for job_id in ("old", "ran", "new"):
        await add(database, job_id)
    await database.write(lambda c: store.touch(c, "ran", {"state": State.STATE_RUNNING}))
    owners = ("one", "two", "three")
    order = [(await database.write(partial(leases.claim_next, owner=one, lease_seconds=60))).job_id for one in owners]
    assert order == ["ran", "old", "new"]
    assert await database.write(lambda c: leases.claim_next(c, "me", 60)) is None


async def test_a_lease_keeps_others_away_until_it_ends(database: Database) -> None:
    await add(database, "a")
    assert await database.write(lambda c: leases.claim_next(c, "elsewhere", 60)) is not None
    assert await database.write(lambda c: leases.claim_next(c, "me", 60)) is None
    await database.write(lambda c: store.touch(c, "a", {"lease_until": time.time() - 1}))
    assert (await database.write(lambda c: leases.claim_next(c, "me", 60))).job_id == "a"
    assert await database.write(lambda c: leases.renew(c, "elsewhere", 60)) == {}
    assert await database.write(lambda c: leases.renew(c, "me", 60)) == {"a": False}
    await database.write(lambda c: leases.release(c, "me"))
    assert (await database.write(lambda c: leases.claim_next(c, "other", 60))).job_id == "a"


async def test_a_job_that_its_owner_does_not_run_is_nobodys(database: Database) -> None:
    await add(database, "a")
    await database.write(lambda c: leases.claim_next(c, "me", 60))  # the answer is lost
    assert await database.write(lambda c: leases.claim_next(c, "other", 60)) is None
    assert await database.write(lambda c: leases.claim_next(c, "me", 60, running={"a"})) is None
    assert (await database.write(lambda c: leases.claim_next(c, "me", 60, running={"b"}))).job_id == "a"


async def test_the_job_of_a_dead_process_is_taken_at_once(database: Database) -> None:
    me = make_identity()
    host, namespace, pid, start_time, tail = me.split("/")
    dead = "/".join([host, namespace, pid, str(int(start_time) - 1), tail])
    assert not is_known_dead(me)
    assert is_known_dead(dead)
    assert not is_known_dead("/".join(["another-host", namespace, pid, "1", tail]))
    await add(database, "a")
    await database.write(lambda c: leases.claim_next(c, dead, 60))
    assert (await database.write(lambda c: leases.claim_next(c, me, 60))).job_id == "a"


async def test_a_cancelled_write_has_ended_when_its_task_has(database: Database) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        store.create(connection, new_job("a"), 100)
        started.set()
        go_on.wait(10)

    task = asyncio.create_task(database.write(slow))
    await asyncio.to_thread(started.wait, 10)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=0.1)
    assert not done, "the transaction is still under way"
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await database.read(lambda c: store.get(c, "a"))).job_id == "a"


async def test_cancelling(database: Database) -> None:
    await add(database, "waits")
    await add(database, "runs")
    row = await database.write(lambda c: store.request_cancel(c, "waits"))
    assert row.state == State.STATE_CANCELLED
    assert (await database.write(lambda c: leases.claim_next(c, "me", 60))).job_id == "runs"
    row = await database.write(lambda c: store.request_cancel(c, "runs"))
    assert row.state == State.STATE_CANCELLING
    assert await database.write(lambda c: leases.renew(c, "me", 60)) == {"runs": True}
    # What the runner says before it knows of it does not bring the job back.
    late = job_pb2.StateChanged(state=State.STATE_RUNNING, status_message="training")
    await database.write(lambda c: record(c, "runs", "me", [late]))
    assert (await database.read(lambda c: store.get(c, "runs"))).state == State.STATE_CANCELLING
    await database.write(lambda c: store.end(c, "runs", "me", State.STATE_CANCELLED, "cancelled"))
    again = await database.write(lambda c: store.request_cancel(c, "runs"))
    assert again.state == State.STATE_CANCELLED
    with pytest.raises(NotFoundError, match="no jobs/none"):
        await database.write(lambda c: store.request_cancel(c, "none"))


async def test_forgetting_a_job_forgets_all_of_it(database: Database) -> None:
    await add(database, "a", labels={"x": "y"})
    with pytest.raises(FailedPreconditionError, match="jobs/a is QUEUED: cancel it first"):
        await database.write(lambda c: store.forget(c, "a"))
    await database.write(lambda c: store.request_cancel(c, "a"))
    await database.write(lambda c: store.forget(c, "a"))
    for table in (events, job_labels):
        assert await database.read(lambda c, t=table: c.scalar(select(func.count()).select_from(t))) == 0


def test_a_store_that_cannot_be_used_names_the_setting() -> None:
    with pytest.raises(ConfigError, match="store_url: cannot use") as caught:
        Database.open("nosuchdb://user:secret@host/x")  # pragma: allowlist secret
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="store_url"):
        Database.open("jobs.db")


def test_a_new_store_has_the_tables_of_every_kind_of_job(tmp_path: Path) -> None:
    code = (
        "import sys; from orchestrator_svc import lifespan; from orchestrator_svc.jobstore.database import Database; "
        "engine = Database.open(sys.argv[1]).engine\n"
        "with engine.begin() as connection: lifespan.create_tables(connection)\n"
        "from sqlalchemy import inspect; print(inspect(engine).get_table_names())"
    )
    # In a process of its own, as a test before this one may have imported everything.
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/jobs.db"]
    tables = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(f"'{name}'" in tables for name in ("jobs", "events", "grpo_draws", "grpo_steps", "grpo_evaluations"))


async def test_tables_of_another_version_are_refused(database: Database) -> None:
    await database.write(lambda c: c.execute(schema_version.update().values(version=VERSION + 1)))
    with pytest.raises(FailedPreconditionError, match="another store_url"):
        await database.write(create_tables)
