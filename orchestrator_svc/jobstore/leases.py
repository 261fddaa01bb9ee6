"""Leases: of the orchestrators on one store, exactly one runs a job.

A row's `owner` holds the job until `lease_until`, which its heartbeat moves on. Every write of a runner is refused once
another is owner (`journal.record`). Lease times are wall-clock seconds: hosts that share a store keep their clocks
within a fraction of `lease_seconds`.
"""

from __future__ import annotations

import time
from collections.abc import Container
from typing import Any

from sqlalchemy import Connection, Row, case, select, update

from orchestrator_svc.jobstore.identity import is_known_dead
from orchestrator_svc.jobstore.messages import ENDED
from orchestrator_svc.jobstore.schema import jobs
from orchestrator_svc.jobstore.store import get
from surogate.v1 import job_pb2


def claim_next(
    connection: Connection, owner: str, lease_seconds: float, running: Container[str] = ()
) -> Row[Any] | None:
    """Takes the next job that nobody runs: those that were running before those that wait, oldest first.

    A job that `owner` holds and that is not among its `running` ones is nobody's either: the answer to its claim, or
    what followed on it, was lost with a connection.

    Returns its row as it was before, with the state from which it is picked up; None when there is nothing to do.
    """
    waiting_last = case((jobs.c.state == job_pb2.Job.STATE_QUEUED, 1), else_=0)
    candidates = connection.execute(
        select(jobs.c.job_id, jobs.c.owner, jobs.c.lease_until)
        .where(jobs.c.state.not_in(list(ENDED)))
        .order_by(waiting_last, jobs.c.create_time, jobs.c.job_id)
    ).all()
    now = time.time()
    for job_id, holder, until in candidates:
        mine = holder == owner
        if (mine and job_id in running) or (holder and not mine and until > now and not is_known_dead(holder)):
            continue
        unchanged = jobs.c.owner.is_(None) if holder is None else jobs.c.owner == holder
        taken = connection.execute(
            update(jobs)
            .where(jobs.c.job_id == job_id, unchanged, jobs.c.state.not_in(list(ENDED)))
            .values(owner=owner, lease_until=now + lease_seconds)
        )
        if taken.rowcount == 1:
            return get(connection, job_id)
    return None


def renew(connection: Connection, owner: str, lease_seconds: float) -> dict[str, bool]:
    """Moves on the leases of all jobs of `owner`; returns them, with whether somebody asked for their cancellation."""
    rows = connection.execute(
        update(jobs)
        .where(jobs.c.owner == owner)
        .values(lease_until=time.time() + lease_seconds)
        .returning(jobs.c.job_id, jobs.c.cancel_requested)
    )
    return {row.job_id: row.cancel_requested for row in rows}


def release(connection: Connection, owner: str) -> None:
    """Lets go of all jobs of `owner`: whoever comes first may run them at once."""
    connection.execute(update(jobs).where(jobs.c.owner == owner).values(owner=None, lease_until=None))
