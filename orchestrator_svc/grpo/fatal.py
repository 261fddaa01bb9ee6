"""Failures that another prompt would meet as well: the job fails with them."""

from __future__ import annotations

from orchestrator_svc.launchers.base import WorkerFailedError
from surogate.errors import (
    InternalError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnimplementedError,
)


class JudgeFailedError(InternalError):
    """The judge gave no score, and the job is not to go on without."""

    reason = "JUDGE_FAILED"


class ReplicasLostError(InternalError):
    """No replica serves, and none will come back."""

    reason = "REPLICAS_LOST"


REFUSALS = (NotFoundError, PermissionDeniedError, UnauthenticatedError, UnimplementedError)
"""What a service says that will not do what it is asked, as long as nobody changes something there."""

FATAL = (JudgeFailedError, ReplicasLostError, WorkerFailedError, *REFUSALS)
"""What else goes wrong with a prompt is that prompt's own: it is dropped."""
