"""A SQL database used from asyncio: SQLite (WAL) by default, PostgreSQL by URL.

Functions get a SQLAlchemy Core connection inside a transaction, and run in a thread: writes one after the other for
SQLite, reads beside them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, func, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from orchestrator_svc import metrics
from surogate.errors import ConfigError, SurogateError, UnavailableError, Violation

T = TypeVar("T")

_READERS = 4
_WRITERS = 4
_BUSY_SECONDS = 30
_FIRST_PAUSE, _MOST_PAUSE = 0.1, 2.0
_POSTGRES = {
    # A server that is gone without a word is noticed, and nothing is waited for without end.
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "options": "-c statement_timeout=60s -c lock_timeout=30s -c idle_in_transaction_session_timeout=120s",
}


@dataclass(frozen=True)
class Commit:
    """A transaction that was to be committed when the connection was lost: by its id the server knows its end."""

    xid: str
    """PostgreSQL's id; empty where there is none."""
    outcome: Any
    """What `work` returned."""


class StoreUnavailableError(UnavailableError):
    """The database does not answer. The transaction has not taken effect, unless its commit was `asked_for`."""

    reason = "STORE_UNAVAILABLE"

    def __init__(self, message: str, asked_for: Commit | None = None) -> None:
        super().__init__(message)
        self.asked_for = asked_for


class Database:
    """Transactions in threads. Made by `Database.open(url)`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.is_sqlite = engine.dialect.name == "sqlite"
        # SQLite takes one writer at a time: a queue in the process is fairer and cheaper than its busy waits.
        self._writers = ThreadPoolExecutor(1 if self.is_sqlite else _WRITERS, thread_name_prefix="store-write")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-read")
        # SQLite's transactions see one state of the database as they are.
        snapshot = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        self._read_engine = engine.execution_options(surogate_read=True, **snapshot)

    @classmethod
    def open(cls, url: str) -> Database:
        """Connects to the database; a SQLite file and its folder are made when missing.

        Raises:
            ConfigError: The URL is wrong, names a driver that is not installed, or nothing answers there.
        """
        try:
            parsed = make_url(url)
            if parsed.get_backend_name() == "sqlite" and parsed.database:
                Path(parsed.database).expanduser().parent.mkdir(parents=True, exist_ok=True)
            arguments = _POSTGRES if parsed.get_backend_name() == "postgresql" else {}
            engine = create_engine(
                parsed, pool_size=_READERS + _WRITERS, pool_pre_ping=True, connect_args=dict(arguments)
            )
            if engine.dialect.name == "sqlite":
                _tune_sqlite(engine)
            with engine.connect():
                return cls(engine)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, OperationalError, TypeError, OSError) as error:
            raise ConfigError.of([Violation("store_url", f"cannot use {_without_password(url)}: {error}")]) from error

    async def write(self, work: Callable[[Connection], T], *, patience: float = 0.0) -> T:
        """Runs `work(connection)` in a read-write transaction: committed when it returns, rolled back when it raises.

        A task that is cancelled meanwhile ends when its transaction has: who comes next finds what it wrote.
        PostgreSQL that is away is tried again for `patience` seconds: `work` may run more than once, and takes effect
        once. (SQLite waits by itself.)

        Raises:
            StoreUnavailableError: The database does not answer.
        """
        give_up, pause = time.monotonic() + (0.0 if self.is_sqlite else patience), _FIRST_PAUSE
        asked: Commit | None = None
        while True:
            try:
                if asked is not None and await self.read(partial(_was_committed, asked)):
                    return asked.outcome  # type: ignore[no-any-return]  # what `work` returned
                asked = None
                return await _seen_through(self._run(self._writers, self.engine, work, "write"))
            except StoreUnavailableError as error:
                asked = error.asked_for or asked
                if time.monotonic() + pause > give_up or (asked and not asked.xid):
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MOST_PAUSE)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Runs `work(connection)` in a read-only transaction that sees one state of the database."""
        return await self._run(self._readers, self._read_engine, work, "read")

    async def close(self) -> None:
        """Waits for what runs and closes the connections."""
        await asyncio.to_thread(self._shut)

    def _shut(self) -> None:
        self._writers.shutdown(wait=True)
        self._readers.shutdown(wait=True)
        self.engine.dispose()

    def _run(
        self, pool: ThreadPoolExecutor, engine: Engine, work: Callable[[Connection], T], access: str
    ) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(pool, _timed, access, engine, work)


async def _seen_through(transaction: asyncio.Future[T]) -> T:
    try:
        return await asyncio.shield(transaction)
    except asyncio.CancelledError:
        await asyncio.wait({transaction})
        raise


def _timed(access: str, engine: Engine, work: Callable[[Connection], T]) -> T:
    start, result = time.perf_counter(), "error"
    try:
        done = _transact(engine, work)
        result = "ok"
    except SurogateError as error:  # most are the work's own answer: the store did what it should
        result = "unavailable" if isinstance(error, StoreUnavailableError) else "ok"
        raise
    finally:
        metrics.STORE_SECONDS.labels(access, result).observe(time.perf_counter() - start)
    return done


def _transact(engine: Engine, work: Callable[[Connection], T]) -> T:
    asked: Commit | None = None
    try:
        with engine.connect() as connection, connection.begin():
            done = work(connection)
            asked = Commit(_transaction_id(connection), done)
        return done
    except (DBAPIError, PoolTimeoutError) as error:
        lost = isinstance(error, OperationalError | PoolTimeoutError) or error.connection_invalidated
        if not lost:
            raise
        why = getattr(error, "orig", error)
        raise StoreUnavailableError(f"the job store does not answer: {why}", asked) from error


def _transaction_id(connection: Connection) -> str:
    """PostgreSQL's id of a transaction that writes; empty for others."""
    if connection.dialect.name != "postgresql" or connection.get_execution_options().get("surogate_read", False):
        return ""
    return str(connection.scalar(text("SELECT pg_current_xact_id()::text")))


def _was_committed(asked: Commit, connection: Connection) -> bool:
    """Whether a transaction took effect whose answer was lost. After a crash what was not written has not."""
    status = connection.scalar(text("SELECT pg_xact_status(CAST(:xid AS xid8))"), {"xid": asked.xid})
    if status == "in progress":  # its connection has not been noticed as lost yet
        raise StoreUnavailableError("the last transaction has not ended", asked)
    return bool(status == "committed")


def one_at_a_time(connection: Connection, what: str) -> None:
    """Has other transactions that ask for the same `what` wait for the end of this one, on whatever host they are.

    SQLite takes one writer at a time anyway.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"surogate {what}"))))


def _tune_sqlite(engine: Engine) -> None:
    """WAL, so that readers and the writer do not wait for each other; explicit BEGIN, so that transactions are real."""

    def connect(raw: Any, _record: Any) -> None:
        raw.isolation_level = None  # pysqlite would begin late, and only for some statements
        cursor = raw.cursor()
        cursor.execute(f"PRAGMA busy_timeout={_BUSY_SECONDS * 1000}")
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    def begin(connection: Connection) -> None:
        # A writer takes its lock at once: one that begins by reading could not upgrade after another's commit.
        reading = connection.get_execution_options().get("surogate_read", False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", begin)


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "that URL (expected for example sqlite:///jobs.db or postgresql+psycopg://user@host/name)"
