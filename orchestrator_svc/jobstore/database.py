"""A SQL database used from asyncio: SQLite (WAL) by default, PostgreSQL by URL.

Functions get a SQLAlchemy Core connection inside a transaction, and run in a thread: writes one after the other for
SQLite, reads beside them. A transaction that is lost with its connection is made again; one whose COMMIT was lost is
looked for first, so that it takes effect once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, func, make_url, select, text
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from orchestrator_svc import metrics
from orchestrator_svc.jobstore.sqlite_file import guard, is_damaged, tune
from surogate.errors import ConfigError, DataLossError, SurogateError, UnavailableError, Violation

T = TypeVar("T")

_READERS = 4
_WRITERS = 4

ANSWER_PATIENCE = 10.0
"""Seconds for which a call of a client waits for a database that is away before it is told so."""
JOB_PATIENCE = 60.0
"""Seconds for which a job waits for a database that is away before it is let go of."""

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
    """PostgreSQL's id."""
    outcome: Any
    """What `work` returned."""


_READ_ONLY = "25006"
"""PostgreSQL's code for a write to a server that only follows another."""
_IN_THE_FUTURE = "22023"
"""PostgreSQL's code for the id of a transaction that it has not had."""
_NOTHING_CHANGED = "nothing was changed"
_NOT_KNOWN = "it is not known whether the change was made: look, or ask for it again"


class StoreDamagedError(DataLossError):
    """The file of the store is damaged, or is no database."""

    reason = "STORE_DAMAGED"


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
            ConfigError: The URL is wrong, names a driver that is not installed, nothing answers there, or what is there
                cannot be written or is no database.
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
                tune(engine)
            with engine.connect() as connection, connection.begin():  # of SQLite the right to write
                pass
            if engine.dialect.name == "sqlite" and parsed.database:
                guard(engine, Path(parsed.database), StoreUnavailableError)
            return cls(engine)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, DatabaseError, TypeError, OSError) as error:
            why = f"cannot use {_without_password(url)}: {getattr(error, 'orig', None) or error}{_hint(error)}"
            raise ConfigError.of([Violation("store_url", why)]) from error

    async def write(self, work: Callable[[Connection], T], *, patience: float = ANSWER_PATIENCE) -> T:
        """Runs `work(connection)` in a read-write transaction: committed when it returns, rolled back when it raises.

        A task that is cancelled meanwhile ends when its transaction has: who comes next finds what it wrote.
        A database that is away is tried again for `patience` seconds: `work` may run more than once, and takes effect
        once.

        Raises:
            StoreUnavailableError: The database does not answer; the message says whether something may have changed.
            StoreDamagedError: The file is damaged.
        """
        asked: Commit | None = None

        async def once() -> T:
            nonlocal asked
            if asked is not None and await self._run(
                self._readers, self._read_engine, partial(_was_committed, asked), "read"
            ):
                return asked.outcome  # type: ignore[no-any-return]  # what `work` returned
            asked = None
            try:
                return await _seen_through(self._run(self._writers, self.engine, work, "write"))
            except StoreUnavailableError as error:
                asked = error.asked_for
                raise

        try:
            return await _patiently(once, patience)
        except StoreUnavailableError as error:
            told = f"{error.message}; {_NOT_KNOWN if asked else _NOTHING_CHANGED}"
            raise StoreUnavailableError(told, asked) from error

    async def read(self, work: Callable[[Connection], T], *, patience: float = ANSWER_PATIENCE) -> T:
        """Runs `work(connection)` in a read-only transaction that sees one state of the database.

        A database that is away is tried again for `patience` seconds. Raises as `write` does.
        """
        return await _patiently(lambda: self._run(self._readers, self._read_engine, work, "read"), patience)

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


async def _patiently(once: Callable[[], Awaitable[T]], patience: float) -> T:
    give_up, pause = time.monotonic() + patience, _FIRST_PAUSE
    while True:
        try:
            return await once()
        except StoreUnavailableError:
            if time.monotonic() + pause > give_up:
                raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, _MOST_PAUSE)


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
            if xid := _transaction_id(connection):
                asked = Commit(xid, done)
        return done
    except (DBAPIError, PoolTimeoutError) as error:
        why = str(getattr(error, "orig", None) or error).strip()
        if is_damaged(error):
            raise StoreDamagedError(f"the job store is damaged: {why}{_hint(error)}") from error
        follows = _code(error) == _READ_ONLY
        if follows:  # the server that is written to is another one now: the next connection may find it
            engine.dispose()
        elif not isinstance(error, OperationalError | PoolTimeoutError) and not error.connection_invalidated:
            raise
        raise StoreUnavailableError(f"the job store cannot be used now: {why}", asked) from error


def _code(error: BaseException) -> str:
    """PostgreSQL's code of what went wrong; empty where there is none."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) or ""


def _hint(error: BaseException) -> str:
    if not is_damaged(error):
        return ""
    return " (it was left as it is: put a backup in its place, or name another file in store_url)"


def _transaction_id(connection: Connection) -> str:
    """PostgreSQL's id of a transaction that writes; empty for others.

    SQLite needs none: a COMMIT that fails has had no effect.
    """
    if connection.dialect.name != "postgresql" or connection.get_execution_options().get("surogate_read", False):
        return ""
    return str(connection.scalar(text("SELECT pg_current_xact_id()::text")))


def _was_committed(asked: Commit, connection: Connection) -> bool:
    """Whether a transaction took effect whose answer was lost. After a crash what was not written has not."""
    try:
        status = connection.scalar(text("SELECT pg_xact_status(CAST(:xid AS xid8))"), {"xid": asked.xid})
    except DBAPIError as error:
        if _code(error) != _IN_THE_FUTURE:
            raise
        return False  # a server that took over, and had not got it
    if status == "in progress":  # its connection has not been noticed as lost yet
        raise StoreUnavailableError("the last transaction has not ended", asked)
    return bool(status == "committed")


def one_at_a_time(connection: Connection, what: str) -> None:
    """Has other transactions that ask for the same `what` wait for the end of this one, on whatever host they are.

    SQLite takes one writer at a time anyway.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"surogate {what}"))))


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "that URL (expected for example sqlite:///jobs.db or postgresql+psycopg://user@host/name)"
