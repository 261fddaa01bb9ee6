"""When the workers of a job were started again, as the store keeps it: the next orchestrator goes on counting."""

from __future__ import annotations

from sqlalchemy import Column, Connection, Double, ForeignKey, String, Table, delete, insert, select

from orchestrator_svc.jobstore.schema import metadata

restarts = Table(
    "worker_restarts",
    metadata,
    Column("job_id", ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True),
    Column("worker", String(64), primary_key=True),
    # Seconds since the epoch.
    Column("time", Double, primary_key=True),
)


def recent_restarts(connection: Connection, job_id: str, worker: str, since: float) -> list[float]:
    """Times of a worker's restarts after `since`, in seconds since the epoch, oldest first."""
    mine = (restarts.c.job_id == job_id) & (restarts.c.worker == worker) & (restarts.c.time > since)
    return list(connection.scalars(select(restarts.c.time).where(mine).order_by(restarts.c.time)))


def add_restart(connection: Connection, job_id: str, worker: str, when: float, since: float) -> None:
    """Writes down a restart, and forgets those before `since`."""
    mine = (restarts.c.job_id == job_id) & (restarts.c.worker == worker)
    connection.execute(delete(restarts).where(mine & (restarts.c.time <= since)))
    connection.execute(insert(restarts).values(job_id=job_id, worker=worker, time=when))
