"""Rows of the store and values of Python as messages of the contract, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from surogate.structs import to_struct
from surogate.v1 import job_pb2

KINDS: Mapping[str, job_pb2.Job.Kind.ValueType] = {
    "pt": job_pb2.Job.KIND_PT,
    "sft": job_pb2.Job.KIND_SFT,
    "grpo": job_pb2.Job.KIND_GRPO,
}

ENDED = frozenset({job_pb2.Job.STATE_SUCCEEDED, job_pb2.Job.STATE_FAILED, job_pb2.Job.STATE_CANCELLED})
"""States that a job does not leave."""


def to_job(row: Any) -> job_pb2.Job:
    """The Job message of a row of `schema.jobs`."""
    job = job_pb2.Job(
        name=f"jobs/{row.job_id}",
        kind=row.kind,
        config=to_struct(row.config),
        state=row.state,
        status_message=row.status_message,
        step=row.step,
        max_steps=row.max_steps,
        policy_version=row.policy_version,
        metrics=row.metrics,
        output_dir=row.output_dir,
        checkpoint=row.checkpoint,
        workers=[job_pb2.Worker(**worker) for worker in row.workers],
        labels=row.labels,
        warnings=row.warnings,
    )
    if row.error:
        job.error.ParseFromString(row.error)
    for name in ("create_time", "start_time", "end_time"):
        if (seconds := getattr(row, name)) is not None:
            getattr(job, name).CopyFrom(timestamp(seconds))
    if row.eta_seconds is not None and row.state not in ENDED:
        job.eta.FromNanoseconds(int(row.eta_seconds * 1e9))
    return job


def timestamp(seconds: float) -> Timestamp:
    """A Timestamp of seconds since the epoch."""
    message = Timestamp()
    message.FromNanoseconds(int(seconds * 1e9))
    return message
