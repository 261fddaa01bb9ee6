"""Default deadlines of the contract's methods, for both ends of a call.

A caller who gives a deadline is always obeyed; these are for the others. Streams that are watched for as long as
their subject lives have none: they end when it ends, when the caller leaves, or when the server drains.
"""

from __future__ import annotations

from collections.abc import Mapping

Deadlines = Mapping[str, float | None]
"""Seconds by the method's short name (`TrainStep`); None means that the method has no default deadline."""

DEFAULT_DEADLINES: Deadlines = {
    "WatchJob": None,
    "ReadLogs": None,
    "WatchSession": None,
    "Watch": None,  # grpc.health.v1.Health
    "ServerReflectionInfo": 60.0,
    "CreateSession": 120.0,
    "TrainStep": 7200.0,
    "PushWeights": 3600.0,
    "CreateCheckpoint": 3600.0,
    "ComputeLogprobs": 1800.0,
    "DeleteSession": 300.0,
    "GenerateRollouts": 7200.0,
    "StreamGenerate": 7200.0,
    "ScoreTokens": 1800.0,
    "ScoreRollouts": 1800.0,
    "ListExamples": 3600.0,
    "TakeTurn": 1800.0,
    "UploadWeights": 3600.0,
    "CommitWeightUpdate": 1800.0,
}


def deadline_of(method: str, overrides: Deadlines, default: float) -> float | None:
    """The default deadline in seconds of a full method name such as `/surogate.v1.JobService/GetJob`."""
    name = method.rpartition("/")[2]
    for table in (overrides, DEFAULT_DEADLINES):
        if name in table:
            return table[name]
    return default
