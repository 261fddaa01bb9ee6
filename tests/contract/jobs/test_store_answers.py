"""Calls of clients whose transactions are lost: each has its effect once, however often it is made."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from orchestrator_svc.create_tables import create_tables
from orchestrator_svc.jobs.context import JobContext
from orchestrator_svc.jobstore import store
from orchestrator_svc.jobstore.database import Commit, Database, StoreUnavailableError
from orchestrator_svc.jobstore.reward_services import replaced_services
from orchestrator_svc.jobstore.scaling import scale_of
from orchestrator_svc.launchers.base import WorkerPool
from surogate.errors import CancelledError, NotFoundError, UnavailableError
from surogate.v1 import job_pb2
from tests.helpers.grpo.grpo_fakes import serving_fakes
from tests.helpers.grpo.grpo_job import job_config
from tests.helpers.grpo.pools import EmptyLauncher
from tests.helpers.orchestrator import Orchestrator, orchestrating
from tests.helpers.postgres import Postgres
from tests.helpers.store_faults import Fault, StoreFaults

State = job_pb2.Job
FAULTS = pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER], ids=["before", "after"])
STATES = ["QUEUED", "STARTING", "RUNNING", "CANCELLING", "CANCELLED"]


async def wait_for_the_end(ctx: JobContext, _: WorkerPool) -> None:
    """A job that trains until it is cancelled."""
    await ctx.running()
    await ctx.cancelled.wait()
    raise CancelledError("cancelled")


async def a_clients_day(folder: Path, url: str, at: int, fault: Fault, *, repeats: bool) -> bool:
    """Creates, scales, cancels and deletes a job, losing transaction `at`; whether there were so many.

    With `repeats` the orchestrator does not try again by itself: the client does.
    """
    name, model = "jobs/job", folder / "model"
    await asyncio.to_thread(model.mkdir, parents=True)
    async with (
        serving_fakes(1) as fakes,
        orchestrating(folder, {"grpo": wait_for_the_end}, EmptyLauncher(), store_url=url, lease_seconds=1.5) as one,
    ):
        assert one.database is not None
        faults = StoreFaults(one.database, at, fault)
        config = job_config(str(model), output_dir="out")
        await answered(lambda: one.create(config, job_id="job", request_id="once"), repeats=repeats)
        await running(one, name)
        scale = job_pb2.ScaleJobRequest(name=name, inference=3)
        await answered(lambda: one.stub.ScaleJob(scale), repeats=repeats)
        service = job_pb2.ReplaceRewardRequest(name=name, address=fakes.addresses["reward"][0])
        await answered(lambda: one.stub.ReplaceReward(service), repeats=repeats)
        await answered(lambda: one.cancel(name), repeats=repeats)
        history = await ended(one, name)
        assert await one.database.read(lambda c: scale_of(c, "job"), patience=10.0) == 3
        replaced = await one.database.read(lambda c: replaced_services(c, "job"), patience=10.0)
        assert len(replaced) == 1
        assert [state for state, _ in history if state] == STATES, history
        with pytest.raises(NotFoundError, match="there is no jobs/job; one was deleted at 2"):
            while True:
                await answered(lambda: one.stub.DeleteJob(job_pb2.DeleteJobRequest(name=name)), repeats=repeats)
    return bool(faults.hit)


@FAULTS
@pytest.mark.parametrize("repeats", [False, True], ids=["the orchestrator tries again", "the client tries again"])
@pytest.mark.parametrize("at", [5, 14, 20])
async def test_a_call_takes_effect_once(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, at: int, repeats: bool
) -> None:
    if repeats:
        impatient(monkeypatch)
    assert await a_clients_day(tmp_path, postgres.new_database(), at, fault, repeats=repeats)


@pytest.mark.slow
@FAULTS
@pytest.mark.parametrize("repeats", [False, True], ids=["the orchestrator tries again", "the client tries again"])
async def test_whichever_transaction_of_a_call_is_lost(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, repeats: bool
) -> None:
    if repeats:
        impatient(monkeypatch)
    at = 1
    while await a_clients_day(tmp_path / str(at), postgres.new_database(), at, fault, repeats=repeats):
        at += 1


@FAULTS
async def test_an_error_says_whether_something_may_have_changed(postgres: Postgres, fault: Fault) -> None:
    database = Database.open(postgres.new_database())
    await database.write(create_tables)
    StoreFaults(database, 1, fault)
    known = "it is not known whether the change was made: look, or ask for it again"
    with pytest.raises(StoreUnavailableError, match=known) as caught:
        await database.write(lambda c: store.find(c, "x"), patience=0.0)
    assert caught.value.asked_for is not None
    StoreFaults(database, 1, Fault.OUTAGE, 60.0)
    with pytest.raises(StoreUnavailableError):
        await database.write(lambda c: store.find(c, "x"), patience=0.0)
    with pytest.raises(StoreUnavailableError, match="; nothing was changed"):
        await database.write(lambda c: store.find(c, "x"), patience=0.0)
    await database.close()


async def test_a_read_is_made_again(postgres: Postgres) -> None:
    database = Database.open(postgres.new_database())
    await database.write(create_tables)
    faults = StoreFaults(database, 1, Fault.OUTAGE, 1.0)
    assert (await database.read(store.count_by_state))["QUEUED"] == 0
    assert faults.hit
    await database.close()


async def test_a_server_that_only_follows_another_is_as_one_that_is_away(postgres: Postgres) -> None:
    url = postgres.new_database()
    database = Database.open(url)
    await database.write(create_tables)
    name = url.rpartition("/")[2]
    postgres.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    postgres.disconnect_all()
    with pytest.raises(StoreUnavailableError, match="read-only transaction; nothing was changed"):
        await database.write(touch, patience=0.5)
    postgres.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    await database.write(touch)  # over a new connection: those that were open still only read
    await database.close()


async def test_a_transaction_that_the_server_has_never_seen_has_no_effect(postgres: Postgres) -> None:
    """A server that took over, and had not got the last transactions, does not know their ids."""
    database = Database.open(postgres.new_database())
    await database.write(create_tables)
    tries: list[int] = []

    def work(connection: Connection) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise StoreUnavailableError("the server is another one now", Commit("4000000000", None))
        touch(connection)

    await database.write(work)
    assert len(tries) == 2
    await database.close()


def touch(connection: Connection) -> None:
    """A write, whatever is there."""
    connection.execute(text("UPDATE schema_version SET version = version"))


async def answered(call: Callable[[], Awaitable[object]], *, repeats: bool) -> None:
    """Makes a call, again when it was answered that the store is away, if that may be."""
    while True:
        try:
            await call()
            return
        except UnavailableError as error:
            assert repeats, error
            assert error.reason == StoreUnavailableError.reason


async def running(one: Orchestrator, name: str) -> None:
    """Waits until the job trains."""
    async with asyncio.timeout(60):
        while (await seen(one, name)).state != State.STATE_RUNNING:  # noqa: ASYNC110 - a stream may be lost
            await asyncio.sleep(0.05)


async def ended(one: Orchestrator, name: str) -> list[tuple[str, str]]:
    """Waits for the job's end; what its history says of its states."""
    while True:
        try:
            events = await one.history(name)
        except UnavailableError:
            continue
        changes = [event.state_changed for event in events if event.HasField("state_changed")]
        return [(State.State.Name(change.state).removeprefix("STATE_"), change.status_message) for change in changes]


async def seen(one: Orchestrator, name: str) -> job_pb2.Job:
    while True:
        try:
            return await one.get(name)
        except UnavailableError:
            await asyncio.sleep(0.05)


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has nobody wait for the store who does not say so."""
    for method in (Database.read, Database.write):
        assert method.__kwdefaults__ is not None
        monkeypatch.setitem(method.__kwdefaults__, "patience", 0.0)
