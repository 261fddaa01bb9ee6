"""A job store whose n-th transaction goes wrong: as a connection that is cut before or after COMMIT, or an outage."""

from __future__ import annotations

import threading
import time
from enum import StrEnum

from sqlalchemy import Connection, event
from sqlalchemy.exc import OperationalError

from orchestrator_svc.jobstore.database import Database


class Fault(StrEnum):
    """What happens to the transaction."""

    CUT_BEFORE = "cut before it took effect"
    CUT_AFTER = "cut after it took effect"
    """Its answer is lost. For a transaction that only reads it is the same as before."""
    OUTAGE = "cut before, and the server is away"


class StoreFaults:
    """Counts the transactions of a store from its making on, and has number `at` go wrong; 0 has none."""

    def __init__(self, database: Database, at: int = 0, fault: Fault = Fault.CUT_BEFORE, seconds: float = 0.0) -> None:
        """`seconds`: how long the server is away in an OUTAGE."""
        self.count = 0
        self.hit = ""
        """The statement that was last in the transaction that went wrong; empty while none has."""
        self._at = at
        self._fault = fault
        self._seconds = seconds
        self._away_until = 0.0
        self._lock = threading.Lock()
        self._last: dict[int, str] = {}
        event.listen(database.engine, "begin", self._begin)
        event.listen(database.engine, "before_cursor_execute", self._notice)
        event.listen(database.engine, "commit", self._commit)

    def _begin(self, _: Connection) -> None:
        if time.monotonic() < self._away_until:
            raise _lost("BEGIN")

    def _notice(self, connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        if "pg_current_xact_id" not in statement:
            self._last[id(connection)] = statement

    def _commit(self, connection: Connection) -> None:
        with self._lock:
            self.count += 1
            if self.count != self._at:
                return
            self.hit = self._last.get(id(connection), "no statement")
        driver = connection.connection.driver_connection
        assert driver is not None
        if self._fault == Fault.CUT_AFTER:
            driver.commit()
        if self._fault == Fault.OUTAGE:
            self._away_until = time.monotonic() + self._seconds
        driver.close()
        raise _lost("COMMIT")


def _lost(statement: str) -> OperationalError:
    return OperationalError(statement, {}, ConnectionError("the connection is lost"))
