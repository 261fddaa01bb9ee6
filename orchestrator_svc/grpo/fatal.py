"""Failures that another prompt would meet as well: the job fails with them."""

from __future__ import annotations

from orchestrator_svc.grpo.replicas import ReplicasLostError
from orchestrator_svc.launchers.base import WorkerFailedError
from surogate.errors import NotFoundError, PermissionDeniedError, UnauthenticatedError, UnimplementedError

FATAL = (
    ReplicasLostError,
    WorkerFailedError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnimplementedError,
)
"""What else goes wrong with a prompt is that prompt's own: it is dropped."""
