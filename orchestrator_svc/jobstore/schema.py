"""Tables of the job store; create_tables.py makes them.

Others that belong to a job (the GRPO ledger) join this metadata with a foreign key on `jobs.job_id` and ON DELETE
CASCADE, so that deleting a job forgets all of it."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True, autoincrement=False))

jobs = Table(
    "jobs",
    metadata,
    Column("job_id", String(63), primary_key=True),
    Column("kind", Integer, nullable=False),
    Column("state", Integer, nullable=False, index=True),
    Column("config", JSON, nullable=False),
    Column("warnings", JSON, nullable=False),
    Column("labels", JSON, nullable=False),
    Column("output_dir", Text, nullable=False),
    # Idempotency: the caller's key, and what it asked for with it.
    Column("request_id", String(128), unique=True),
    Column("request_digest", String(64), nullable=False),
    # Seconds since the epoch.
    Column("create_time", Double, nullable=False, index=True),
    Column("start_time", Double),
    Column("end_time", Double),
    # Progress.
    Column("status_message", Text, nullable=False, default=""),
    Column("error", LargeBinary),
    Column("step", BigInteger, nullable=False, default=0),
    Column("max_steps", BigInteger, nullable=False, default=0),
    Column("policy_version", BigInteger, nullable=False, default=0),
    Column("metrics", JSON, nullable=False, default=dict),
    Column("checkpoint", Text, nullable=False, default=""),
    Column("eta_seconds", Double),
    Column("workers", JSON, nullable=False, default=list),
    # The number of the newest event.
    Column("last_sequence", BigInteger, nullable=False, default=0),
    # What the job's runner wants to find again after a restart.
    Column("runner_state", JSON, nullable=False, default=dict),
    # Which orchestrator runs it, and until when that is sure.
    Column("owner", String(255)),
    Column("lease_until", Double),
    Column("cancel_requested", Boolean, nullable=False, default=False),
)

job_labels = Table(
    "job_labels",
    metadata,
    Column("job_id", ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("value", String(255), nullable=False),
    Index("job_labels_by_value", "key", "value"),
)

events = Table(
    "events",
    metadata,
    Column("job_id", ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    # A serialised surogate.v1.JobEvent.
    Column("event", LargeBinary, nullable=False),
)

deleted_jobs = Table(
    "deleted_jobs",
    metadata,
    Column("job_id", String(63), primary_key=True),
    # Which job of that id it was: `store.uid_of`.
    Column("uid", String(16), primary_key=True),
    Column("delete_time", Double, nullable=False, index=True),
)
"""Jobs that were forgotten: what they may have left elsewhere is known to be theirs."""
