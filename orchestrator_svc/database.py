"""A SQL database used from asyncio: SQLite (WAL) by default, PostgreSQL by URL.

Functions get a SQLAlchemy Core connection inside a transaction, and run in a thread: writes one after the other for
SQLite, reads beside them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError

from orchestrator_svc import metrics
from surogate.errors import ConfigError, SurogateError, UnavailableError, Violation

T = TypeVar("T")

STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
"""Reason of the error that is raised when the database does not answer."""

_READERS = 4
_WRITERS = 4
_BUSY_SECONDS = 30


class Database:
    """Transactions in threads. Made by `Database.open(url)`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.is_sqlite = engine.dialect.name == "sqlite"
        # SQLite takes one writer at a time: a queue in the process is fairer and cheaper than its busy waits.
        self._writers = ThreadPoolExecutor(1 if self.is_sqlite else _WRITERS, thread_name_prefix="store-write")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-read")
        self._read_engine = engine.execution_options(surogate_read=True)

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
            engine = create_engine(parsed, pool_size=_READERS + _WRITERS, pool_pre_ping=True)
            if engine.dialect.name == "sqlite":
                _tune_sqlite(engine)
            with engine.connect():
                return cls(engine)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, OperationalError, TypeError, OSError) as error:
            raise ConfigError.of([Violation("store_url", f"cannot use {_without_password(url)}: {error}")]) from error

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Runs `work(connection)` in a read-write transaction: committed when it returns, rolled back when it raises.

        The transaction is seen through even if the awaiting task is cancelled.

        Raises:
            UnavailableError: The database does not answer.
        """
        return await asyncio.shield(self._run(self._writers, self.engine, work, "write"))

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


def _timed(access: str, engine: Engine, work: Callable[[Connection], T]) -> T:
    start, result = time.perf_counter(), "error"
    try:
        done = _transact(engine, work)
        result = "ok"
    except SurogateError as error:  # most are the work's own answer: the store did what it should
        result = "unavailable" if error.reason == STORE_UNAVAILABLE else "ok"
        raise
    finally:
        metrics.STORE_SECONDS.labels(access, result).observe(time.perf_counter() - start)
    return done


def _transact(engine: Engine, work: Callable[[Connection], T]) -> T:
    try:
        with engine.begin() as connection:
            return work(connection)
    except OperationalError as error:
        raise UnavailableError(f"the job store does not answer: {error.orig}", reason=STORE_UNAVAILABLE) from error


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
