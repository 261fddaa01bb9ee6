"""How many inference replicas a running GRPO job shall have, as the store keeps it; who asks, and what is refused."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, Connection, ForeignKey, Integer, Table, delete, insert, select

from orchestrator_svc.jobstore.messages import ENDED
from orchestrator_svc.jobstore.schema import metadata
from orchestrator_svc.settings import OrchestratorSettings
from surogate.config.job import GrpoJob, resolve_job
from surogate.errors import FailedPreconditionError, InvalidInputError, Violation

scales = Table(
    "job_scales",
    metadata,
    Column("job_id", ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True),
    Column("inference", Integer, nullable=False),
)


def scale_of(connection: Connection, job_id: str) -> int | None:
    """Replicas that somebody asked for; None while it is what the job was made with."""
    return connection.scalar(select(scales.c.inference).where(scales.c.job_id == job_id))


def set_scale(connection: Connection, job_id: str, inference: int) -> None:
    """Writes down how many replicas the job shall have."""
    connection.execute(delete(scales).where(scales.c.job_id == job_id))
    connection.execute(insert(scales).values(job_id=job_id, inference=inference))


def check_scale(row: Any, inference: int, settings: OrchestratorSettings) -> None:
    """Makes sure that a job can have so many replicas.

    Raises:
        FailedPreconditionError: It has ended, has no replicas, or its workers are not started here.
        InvalidInputError: The number is out of range.
    """
    if not 1 <= inference <= settings.max_replicas:
        why = f"is {inference}; it must be 1 to {settings.max_replicas} (max_replicas)"
        raise InvalidInputError(f"inference {why}", violations=[Violation("inference", why)])
    if row.state in ENDED:
        raise FailedPreconditionError(f"jobs/{row.job_id} has ended", reason="JOB_ENDED")
    if not isinstance(job := resolve_job(row.config), GrpoJob):
        raise FailedPreconditionError(f"jobs/{row.job_id} is of kind {job.kind}: it has no replicas", reason="NOT_GRPO")
    if settings.launcher == "static":
        raise FailedPreconditionError(
            "the static launcher uses replicas that somebody else runs: start more, and name them in its settings",
            reason="STATIC_REPLICAS",
        )
