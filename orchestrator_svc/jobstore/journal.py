"""Writing what happens to a job: events, and the job's row beside them, in one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, insert, select, update

from orchestrator_svc.jobstore.schema import events, jobs
from surogate.errors import FailedPreconditionError
from surogate.v1 import job_pb2

Happening = (
    job_pb2.StateChanged
    | job_pb2.StepCompleted
    | job_pb2.CheckpointSaved
    | job_pb2.EvaluationCompleted
    | job_pb2.WeightsPushed
    | job_pb2.Notice
    | job_pb2.SamplesShown
)
"""What a JobEvent can bring."""

_FIELD_OF: Mapping[type, str] = {
    job_pb2.StateChanged: "state_changed",
    job_pb2.StepCompleted: "step_completed",
    job_pb2.CheckpointSaved: "checkpoint_saved",
    job_pb2.EvaluationCompleted: "evaluation_completed",
    job_pb2.WeightsPushed: "weights_pushed",
    job_pb2.Notice: "notice",
    job_pb2.SamplesShown: "samples_shown",
}


_ACTIVE = frozenset({job_pb2.Job.STATE_STARTING, job_pb2.Job.STATE_RUNNING})


class LeaseLostError(FailedPreconditionError):
    """Another orchestrator runs the job now: this one must let go of it and write nothing more."""

    reason = "LEASE_LOST"


def record(
    connection: Connection,
    job_id: str,
    owner: str | None,
    happenings: Sequence[Happening] = (),
    changes: Mapping[str, Any] | None = None,
    also: Callable[[Connection], None] | None = None,
) -> int:
    """Appends events and changes the job's row; what the events imply for the row is changed with them.

    Args:
        connection: Inside a read-write transaction.
        job_id: The job.
        owner: Who must hold the job's lease for this to be done; None for what needs no lease.
        happenings: Events to append, in order.
        changes: Columns to set. `metrics` are merged into those that are there.
        also: Done in the same transaction: both are kept or neither.

    Returns:
        The sequence number of the job's newest event.

    Raises:
        LeaseLostError: The job is gone, or `owner` does not hold it.
    """
    mine = jobs.c.job_id == job_id if owner is None else (jobs.c.job_id == job_id) & (jobs.c.owner == owner)
    numbered = (
        update(jobs)
        .where(mine)
        .values(last_sequence=jobs.c.last_sequence + len(happenings))
        .returning(jobs.c.last_sequence, jobs.c.step, jobs.c.metrics, jobs.c.cancel_requested)
    )
    row = connection.execute(numbered).one_or_none()
    if row is None:
        raise LeaseLostError(f"jobs/{job_id} is not run by this orchestrator any more")
    if row.cancel_requested:
        happenings = [_still_cancelling(happening) for happening in happenings]
    values = _implied(happenings, row.step)
    values |= changes or {}
    metrics = _implied_metrics(happenings) | dict((changes or {}).get("metrics", {}))
    if metrics:
        values["metrics"] = {**row.metrics, **metrics}
    if values:
        connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(**values))
    first = row.last_sequence - len(happenings) + 1
    rows = [_event_row(job_id, first + i, happening) for i, happening in enumerate(happenings)]
    if rows:
        connection.execute(insert(events), rows)
    if also is not None:
        also(connection)
    return int(row.last_sequence)


def read_events(connection: Connection, job_id: str, after: int, limit: int) -> list[job_pb2.JobEvent]:
    """The next events of a job after a sequence number, at most `limit`."""
    query = (
        select(events.c.event)
        .where(events.c.job_id == job_id, events.c.sequence > after)
        .order_by(events.c.sequence)
        .limit(limit)
    )
    return [job_pb2.JobEvent.FromString(payload) for payload in connection.scalars(query)]


def _event_row(job_id: str, sequence: int, happening: Happening) -> dict[str, Any]:
    event = job_pb2.JobEvent(sequence=sequence)
    event.time.FromNanoseconds(time.time_ns())
    getattr(event, _FIELD_OF[type(happening)]).CopyFrom(happening)
    # An event without content (Notice()) must still say which it is.
    getattr(event, _FIELD_OF[type(happening)]).SetInParent()
    return {"job_id": job_id, "sequence": sequence, "event": event.SerializeToString()}


def _still_cancelling(happening: Happening) -> Happening:
    """A runner that does not know of the cancellation yet must not take the job back to RUNNING."""
    if isinstance(happening, job_pb2.StateChanged) and happening.state in _ACTIVE:
        return job_pb2.StateChanged(state=job_pb2.Job.STATE_CANCELLING, status_message=happening.status_message)
    return happening


def _implied(happenings: Sequence[Happening], step: int) -> dict[str, Any]:
    """Columns that follow from events. `step` never goes back: a replayed step has been done before."""
    values: dict[str, Any] = {}
    for happening in happenings:
        match happening:
            case job_pb2.StepCompleted():
                values["step"] = step = max(step, happening.step)
                if happening.max_steps:
                    values["max_steps"] = happening.max_steps
            case job_pb2.CheckpointSaved():
                values["checkpoint"] = happening.path
            case job_pb2.WeightsPushed():
                values["policy_version"] = happening.policy_version
            case job_pb2.StateChanged():
                values["state"] = happening.state
                values["status_message"] = happening.status_message
    return values


def _implied_metrics(happenings: Sequence[Happening]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for happening in happenings:
        match happening:
            case job_pb2.StepCompleted():
                metrics |= dict(happening.metrics)
            case job_pb2.EvaluationCompleted():
                metrics |= {
                    f"eval/{happening.environment}/{name.removeprefix('eval/')}": value
                    for name, value in happening.metrics.items()
                }
    return {name: value for name, value in metrics.items() if value == value and abs(value) != float("inf")}
