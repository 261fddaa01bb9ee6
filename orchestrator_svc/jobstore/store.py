"""Jobs in the store: making, finding, cancelling and forgetting them. Functions on a connection in a transaction."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, and_, delete, func, insert, or_, select, update

from orchestrator_svc.jobstore.database import one_at_a_time
from orchestrator_svc.jobstore.journal import record
from orchestrator_svc.jobstore.messages import ENDED
from orchestrator_svc.jobstore.schema import deleted_jobs, job_labels, jobs
from surogate.errors import (
    AlreadyExistsError,
    BusyError,
    FailedPreconditionError,
    InvalidInputError,
    NotFoundError,
    Violation,
)
from surogate.v1 import job_pb2

_State = job_pb2.Job.State
_QUEUE_RETRY_SECONDS = 30.0
_REMEMBERED_SECONDS = 30 * 86_400.0
"""For so long it is known that a job was deleted."""


@dataclass(frozen=True)
class NewJob:
    """What a job is made of."""

    job_id: str
    kind: int
    config: Mapping[str, Any]
    warnings: Sequence[str]
    labels: Mapping[str, str]
    output_dir: str
    request_id: str
    request_digest: str
    max_steps: int = 0


def digest(*parts: Any) -> str:
    """A digest of JSON values: equal for equal ones."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def create(connection: Connection, new: NewJob, max_queued: int) -> Row[Any]:
    """Stores a job as QUEUED, with its first event; a repeated request returns the job that the first one made.

    Raises:
        AlreadyExistsError: The id is taken, or the request id was used for something else.
        FailedPreconditionError: A job that has not ended writes to the same folder.
        BusyError: The queue is full.
    """
    one_at_a_time(connection, "create")  # what is looked for here must not come in meanwhile
    if new.request_id and (row := find_request(connection, new.request_id, new.request_digest)) is not None:
        return row
    if find(connection, new.job_id) is not None:
        raise AlreadyExistsError(f"jobs/{new.job_id} exists: choose another job_id, or delete that job first")
    _check_folder_is_free(connection, new.output_dir)
    queued = connection.scalar(select(func.count()).where(jobs.c.state == job_pb2.Job.STATE_QUEUED))
    if (queued or 0) >= max_queued:
        raise BusyError(f"{queued} jobs wait already: try again later", retry_after=_QUEUE_RETRY_SECONDS)
    values = {**new.__dict__, "request_id": new.request_id or None}
    values |= {"state": job_pb2.Job.STATE_QUEUED, "create_time": time.time()}
    connection.execute(insert(jobs).values(**values))
    if new.labels:
        rows = [{"job_id": new.job_id, "key": key, "value": value} for key, value in new.labels.items()]
        connection.execute(insert(job_labels), rows)
    queued_event = job_pb2.StateChanged(state=job_pb2.Job.STATE_QUEUED, status_message="waiting for its turn")
    notices = [
        job_pb2.Notice(severity=job_pb2.Notice.SEVERITY_WARNING, component="config", text=text) for text in new.warnings
    ]
    record(connection, new.job_id, None, [queued_event, *notices])
    return get(connection, new.job_id)


def find_request(connection: Connection, request_id: str, request_digest: str) -> Row[Any] | None:
    """The job that a request id made, if any.

    Raises:
        AlreadyExistsError: It was another request.
    """
    row = connection.execute(select(jobs).where(jobs.c.request_id == request_id)).one_or_none()
    if row is not None and row.request_digest != request_digest:
        raise AlreadyExistsError(
            f"request_id {request_id!r} made jobs/{row.job_id} from another configuration: use a new request_id",
            reason="REQUEST_ID_REUSED",
        )
    return row


def find(connection: Connection, job_id: str) -> Row[Any] | None:
    """A job's row, or None."""
    return connection.execute(select(jobs).where(jobs.c.job_id == job_id)).one_or_none()


def get(connection: Connection, job_id: str) -> Row[Any]:
    """A job's row. Raises NotFoundError."""
    row = find(connection, job_id)
    if row is None:
        text = f"there is no jobs/{job_id}{_deletion(connection, job_id)}"
        raise NotFoundError(text, metadata={"name": f"jobs/{job_id}"})
    return row


def _deletion(connection: Connection, job_id: str) -> str:
    """That there was one: whoever deletes a job again, since the answer was lost, learns that it is done."""
    deleted = select(func.max(deleted_jobs.c.delete_time)).where(deleted_jobs.c.job_id == job_id)
    when = connection.scalar(deleted)
    return "" if when is None else f"; one was deleted at {datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M:%S} UTC"


def uid_of(job_id: str, create_time: float) -> str:
    """Tells a job from an earlier one of the same id."""
    return digest(job_id, create_time)[:16]


def known_runs(connection: Connection, job_ids: Collection[str]) -> dict[tuple[str, str], bool]:
    """The jobs of these ids that the store knows, by id and `uid_of`, and whether each has ended; deleted ones have."""
    forgotten = select(deleted_jobs.c.job_id, deleted_jobs.c.uid).where(deleted_jobs.c.job_id.in_(job_ids))
    known = {(row.job_id, row.uid): True for row in connection.execute(forgotten)}
    kept = select(jobs.c.job_id, jobs.c.create_time, jobs.c.state).where(jobs.c.job_id.in_(job_ids))
    for row in connection.execute(kept):
        known[row.job_id, uid_of(row.job_id, row.create_time)] = row.state in ENDED
    return known


def jobs_ahead(connection: Connection, row: Row[Any]) -> int:
    """Number of jobs that were queued before this one and still wait."""
    earlier = or_(
        jobs.c.create_time < row.create_time, and_(jobs.c.create_time == row.create_time, jobs.c.job_id < row.job_id)
    )
    waiting = jobs.c.state == job_pb2.Job.STATE_QUEUED
    return connection.scalar(select(func.count()).select_from(jobs).where(waiting, earlier)) or 0


def count_by_state(connection: Connection) -> dict[str, int]:
    """Number of jobs in each state that is not an end, by the state's short name (`QUEUED`)."""
    counted = connection.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state))
    found = {row[0]: int(row[1]) for row in counted}
    return {
        name.removeprefix("STATE_"): found.get(number, 0)
        for name, number in _State.items()
        if number not in ENDED and number != job_pb2.Job.STATE_UNSPECIFIED
    }


def list_page(
    connection: Connection,
    *,
    page_size: int,
    page_token: str,
    states: Sequence[int] = (),
    kinds: Sequence[int] = (),
    labels: Mapping[str, str] | None = None,
) -> tuple[list[Row[Any]], str]:
    """Jobs that match, newest first, and the token of the next page (empty after the last).

    Raises:
        InvalidInputError: The token is not one of ours, or came with other filters.
    """
    filters = _filters(states, kinds, labels)
    query = select(jobs).order_by(jobs.c.create_time.desc(), jobs.c.job_id.desc()).limit(page_size + 1)
    if states:
        query = query.where(jobs.c.state.in_(states))
    if kinds:
        query = query.where(jobs.c.kind.in_(kinds))
    for key, value in (labels or {}).items():
        has = select(job_labels.c.job_id).where(job_labels.c.key == key, job_labels.c.value == value)
        query = query.where(jobs.c.job_id.in_(has))
    if page_token:
        created, job_id = _read_token(page_token, filters)
        same_time = and_(jobs.c.create_time == created, jobs.c.job_id < job_id)
        query = query.where(or_(jobs.c.create_time < created, same_time))
    rows = list(connection.execute(query))
    if len(rows) <= page_size:
        return rows, ""
    return rows[:page_size], page_after(rows[page_size - 1], states=states, kinds=kinds, labels=labels)


def page_after(
    row: Row[Any], *, states: Sequence[int] = (), kinds: Sequence[int] = (), labels: Mapping[str, str] | None = None
) -> str:
    """The token of the page that begins after a job, of a listing with these filters."""
    return _write_token(row.create_time, row.job_id, _filters(states, kinds, labels))


def _filters(states: Sequence[int], kinds: Sequence[int], labels: Mapping[str, str] | None) -> str:
    return digest(sorted(states), sorted(kinds), dict(labels or {}))[:16]


def request_cancel(connection: Connection, job_id: str) -> Row[Any]:
    """Asks a job to stop: a queued one is CANCELLED at once, one that runs is CANCELLING. Raises NotFoundError."""
    row = get(connection, job_id)
    if row.state in ENDED or row.state == job_pb2.Job.STATE_CANCELLING:
        return row
    # A queued job that an orchestrator has just claimed belongs to that one already.
    if row.state == job_pb2.Job.STATE_QUEUED and row.owner is None:
        end(connection, job_id, None, job_pb2.Job.STATE_CANCELLED, "cancelled before it was started")
    else:
        event = job_pb2.StateChanged(state=job_pb2.Job.STATE_CANCELLING, status_message="saving and stopping")
        record(connection, job_id, None, [event], {"cancel_requested": True})
    return get(connection, job_id)


def end(
    connection: Connection,
    job_id: str,
    owner: str | None,
    state: _State.ValueType,
    message: str,
    error: Any = None,
) -> None:
    """Writes a job's end, and lets go of its lease. Raises LeaseLostError if `owner` does not hold it."""
    event = job_pb2.StateChanged(state=state, status_message=message, error=error)
    changes: dict[str, Any] = {
        "end_time": time.time(),
        "owner": None,
        "lease_until": None,
        "workers": [],
        "eta_seconds": None,
        "error": error.SerializeToString() if error is not None else None,
    }
    record(connection, job_id, owner, [event], changes)


def forget(connection: Connection, job_id: str) -> None:
    """Deletes an ended job, its events, and whatever else hangs on its row.

    Raises:
        NotFoundError: There is none.
        FailedPreconditionError: It has not ended.
    """
    row = get(connection, job_id)
    if row.state not in ENDED:
        state = job_pb2.Job.State.Name(row.state).removeprefix("STATE_")
        raise FailedPreconditionError(f"jobs/{job_id} is {state}: cancel it first", reason="JOB_NOT_ENDED")
    connection.execute(delete(jobs).where(jobs.c.job_id == job_id))
    now = time.time()
    connection.execute(delete(deleted_jobs).where(deleted_jobs.c.delete_time < now - _REMEMBERED_SECONDS))
    connection.execute(insert(deleted_jobs).values(job_id=job_id, uid=uid_of(job_id, row.create_time), delete_time=now))


def touch(connection: Connection, job_id: str, values: Mapping[str, Any]) -> None:
    """Sets columns of a job, without an event."""
    connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(**values))


def _check_folder_is_free(connection: Connection, output_dir: str) -> None:
    other = connection.scalar(
        select(jobs.c.job_id).where(jobs.c.output_dir == output_dir, jobs.c.state.not_in(list(ENDED))).limit(1)
    )
    if other is not None:
        raise FailedPreconditionError(
            f"output_dir {output_dir} is being written by jobs/{other}: choose another, or wait for that job to end",
            reason="OUTPUT_DIR_IN_USE",
            metadata={"job": f"jobs/{other}"},
        )


def _write_token(created: float, job_id: str, filters: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([created, job_id, filters]).encode()).decode()


def _read_token(token: str, filters: str) -> tuple[float, str]:
    try:
        created, job_id, used = json.loads(base64.urlsafe_b64decode(token.encode()))
        if used == filters:
            return float(created), str(job_id)
        why = "came with other filters: keep them the same from page to page"
    except (ValueError, TypeError, OverflowError, RecursionError):
        why = "is not one that this server gave"
    raise InvalidInputError(f"page_token {why}", violations=[Violation("page_token", why)])
