"""What happens to the file of a SQLite store: a full disk, a lock, a file that is gone, replaced, damaged."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import Connection, event, text

from orchestrator_svc.__main__ import main
from orchestrator_svc.create_tables import create_tables
from orchestrator_svc.jobstore import database as database_module
from orchestrator_svc.jobstore import sqlite_file, store
from orchestrator_svc.jobstore.database import Database, StoreDamagedError, StoreUnavailableError
from orchestrator_svc.jobstore.journal import record
from surogate.errors import NotFoundError
from surogate.v1 import job_pb2

BIG = job_pb2.Notice(text="x" * 200_000)


@pytest_asyncio.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database.open(f"sqlite:///{tmp_path}/jobs.db")
    await database.write(create_tables)
    await add(database, "a")
    yield database
    await database.close()


async def add(database: Database, job_id: str) -> None:
    new = store.NewJob(job_id, job_pb2.Job.KIND_SFT, {}, [], {}, f"/out/{job_id}", "", "")
    await database.write(lambda c: store.create(c, new, 10))


async def tell(database: Database, happening: Any, patience: float = 0.0) -> int:
    return await database.write(lambda c: record(c, "a", None, [happening]), patience=patience)


async def test_a_full_disk_is_told_and_what_could_be_written_stays(database: Database) -> None:
    limit = await database.read(lambda c: c.scalar(text("PRAGMA page_count")))

    def fill(raw: Any, *_: object) -> None:
        raw.execute(f"PRAGMA max_page_count={limit}")

    event.listen(database.engine, "checkout", fill)
    with pytest.raises(StoreUnavailableError, match="database or disk is full; nothing was changed"):
        await tell(database, BIG)
    assert (await database.read(lambda c: store.get(c, "a"))).last_sequence == 1
    event.remove(database.engine, "checkout", fill)
    event.listen(database.engine, "checkout", lambda raw, *_: raw.execute("PRAGMA max_page_count=1000000"))
    assert await tell(database, BIG) == 2


async def test_a_job_waits_until_there_is_room_again(database: Database) -> None:
    refused = []

    def refuse(_: Connection) -> None:
        if len(refused) < 3:
            refused.append(1)
            raise sqlite3.OperationalError("database or disk is full")

    def as_the_driver_says(connection: Connection) -> None:
        try:
            refuse(connection)
        except sqlite3.OperationalError as error:
            raise database_module.OperationalError("COMMIT", {}, error) from error

    event.listen(database.engine, "commit", as_the_driver_says)
    assert await tell(database, job_pb2.Notice(), patience=60.0) == 2
    assert len(refused) == 3


async def test_a_lock_that_another_process_keeps_is_told(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "_BUSY_SECONDS", 0.05)
    database.engine.dispose()
    other = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailableError, match="database is locked; nothing was changed"):
        await tell(database, job_pb2.Notice())
    assert (await database.read(lambda c: store.get(c, "a"))).last_sequence == 1, "reads go on"
    other.execute("ROLLBACK")
    other.close()
    assert await tell(database, job_pb2.Notice()) == 2


async def test_nothing_is_written_to_a_file_that_is_gone(database: Database, tmp_path: Path) -> None:
    shutil.move(tmp_path / "jobs.db", tmp_path / "elsewhere.db")
    with pytest.raises(StoreUnavailableError, match=r"jobs\.db was moved, deleted or replaced .*; nothing was changed"):
        await tell(database, job_pb2.Notice())
    assert not (tmp_path / "jobs.db").exists(), "no empty store takes its place"
    shutil.move(tmp_path / "elsewhere.db", tmp_path / "jobs.db")
    assert await tell(database, job_pb2.Notice()) == 2


async def test_a_file_in_the_place_of_the_store_is_not_taken_for_it(database: Database, tmp_path: Path) -> None:
    (tmp_path / "jobs.db").unlink()
    other = Database.open(f"sqlite:///{tmp_path}/jobs.db")
    await other.write(create_tables)
    with pytest.raises(StoreUnavailableError, match="start the orchestrator again to use what is there now"):
        await database.read(lambda c: store.get(c, "a"), patience=0.0)
    with pytest.raises(NotFoundError):
        await other.read(lambda c: store.get(c, "a"))
    await other.close()


async def test_damage_that_is_met_while_it_runs_is_told(database: Database, tmp_path: Path) -> None:
    for index in range(20):
        await tell(database, job_pb2.Notice(text=f"{index}" * 1000))
    database.engine.dispose()  # the log goes into the file
    damage(tmp_path / "jobs.db", after=4096)
    with pytest.raises(StoreDamagedError, match=r"the job store is damaged: .*put a backup in its place"):
        await database.read(lambda c: store.get(c, "a"))


@pytest.mark.parametrize("what", ["another file", "its head", "its tables"])
def test_a_damaged_file_is_named_and_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    file = tmp_path / "jobs.db"
    if what == "another file":
        file.write_text("these are no jobs, but somebody's notes\n" * 1000)
    else:
        Database.open(f"sqlite:///{file}").engine.dispose()
        with sqlite3.connect(file) as connection:
            connection.execute("CREATE TABLE jobs (job_id TEXT)")
        connection.close()
        damage(file, after=16 if what == "its head" else 100)
    before = file.read_bytes()
    code = main_with(file)
    said = capsys.readouterr().err
    assert code in (1, 2)
    assert "it was left as it is: put a backup in its place" in said
    assert "Traceback" not in said
    assert file.read_bytes() == before


async def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    Database.open(f"sqlite:///{tmp_path}/jobs.db").engine.dispose()
    database = Database.open(f"sqlite:///file:{tmp_path}/jobs.db?mode=ro&uri=true")
    with pytest.raises(StoreUnavailableError, match="attempt to write a readonly database; nothing was changed"):
        await database.write(create_tables, patience=0.0)
    await database.close()


def main_with(file: Path) -> int:
    """The exit code of an orchestrator on that store."""
    import sys

    argv = sys.argv
    sys.argv = ["orchestrator", "--store-url", f"sqlite:///{file}", "--metrics-listen", ""]
    try:
        return main()
    finally:
        sys.argv = argv


def damage(file: Path, after: int) -> None:
    """Overwrites all but the first bytes."""
    whole = file.read_bytes()
    file.write_bytes(whole[:after] + b"\xa5" * (len(whole) - after))
