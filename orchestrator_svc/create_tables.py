"""Makes the tables of the job store where they are missing: the jobs', and those of other files."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select

from orchestrator_svc.grpo import ledger
from orchestrator_svc.jobstore import restarts, reward_services, scaling
from orchestrator_svc.jobstore.database import one_at_a_time
from orchestrator_svc.jobstore.schema import metadata, schema_version
from surogate.errors import FailedPreconditionError

VERSION = 1
"""Version of the tables; raised by every change that an older program could not read."""


def create_tables(connection: Connection) -> None:
    """Makes the tables where they are missing.

    Raises:
        FailedPreconditionError: The database was written by another version of the program.
    """
    # Tables join the metadata when their file is imported: without these a fresh store would lack them.
    elsewhere = (ledger.draws, restarts.restarts, reward_services.replaced, scaling.scales)
    assert all(table.metadata is metadata for table in elsewhere)
    one_at_a_time(connection, "tables")  # several orchestrators may start on a new database at once
    metadata.create_all(connection)
    found = connection.execute(select(schema_version.c.version)).scalar()
    if found is None:
        connection.execute(insert(schema_version).values(version=VERSION))
    elif found != VERSION:
        raise FailedPreconditionError(
            f"the job store has version {found} of the tables, this program needs {VERSION}: use the program that "
            "wrote it, or another store_url",
            reason="STORE_VERSION",
        )
