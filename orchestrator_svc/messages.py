"""Rows of the store and values of Python as messages of the contract, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import struct_pb2
from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp

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


def to_struct(config: Mapping[str, Any]) -> struct_pb2.Struct:
    """A Struct of a mapping of JSON values."""
    message = struct_pb2.Struct()
    message.update(config)
    return message


def from_struct(message: struct_pb2.Struct) -> dict[str, Any]:
    """The mapping in a Struct. A Struct knows doubles only: whole numbers come back as integers."""
    return {key: _whole(value) for key, value in MessageToDict(message).items()}


def _whole(value: Any) -> Any:
    match value:
        case dict():
            return {key: _whole(item) for key, item in value.items()}
        case list():
            return [_whole(item) for item in value]
        case float() if value.is_integer():
            return int(value)
    return value
