"""SQLite as the job store: how its connections are set up, and what can happen to its file."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event

_BUSY_SECONDS = 30
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


def tune(engine: Engine) -> None:
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


def guard(engine: Engine, path: Path, error: type[Exception]) -> None:
    """Has every transaction raise `error` while the file is another one than it is now, or none.

    Connections that are open would go on with the file that was deleted, new ones with the one in its place.
    """
    opened = _identity(path)

    def check(_: Connection) -> None:
        if opened is not None and _identity(path) != opened:
            raise error(
                f"the job store's file {path} was moved, deleted or replaced while it was open: move it back, or start "
                "the orchestrator again to use what is there now"
            )

    event.listen(engine, "begin", check, insert=True)


def is_damaged(error: BaseException) -> bool:
    """Whether SQLite says that the file is damaged, or is no database."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _DAMAGED  # the rest is a detail of it


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another of the same name; None where there is none, as with a database in memory."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
