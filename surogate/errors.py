"""Domain exceptions: what went wrong, where, and what to do instead.

Each is also the standard exception it is a kind of, carries a stable `reason` for programs, and a message for people.
`surogate.rpc.status` is the one place that maps them to gRPC status codes and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class SurogateError(Exception):
    """Base of everything that Surogate raises on purpose.

    `reason` is an UPPER_SNAKE_CASE constant that programs may test (google.rpc.ErrorInfo.reason); `metadata` adds
    facts to it, as strings.
    """

    reason: str = "INTERNAL"

    def __init__(self, message: str, *, reason: str | None = None, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.metadata = dict(metadata or {})

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Violation:
    """One thing wrong with an input: `field` is its key (`train.learning_rate`), `description` what and what to do."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}" if self.field else self.description


class InvalidInputError(SurogateError, ValueError):
    """What the caller gave is wrong, whatever the state of the system. gRPC: INVALID_ARGUMENT."""

    reason = "INVALID_INPUT"

    def __init__(
        self,
        message: str,
        *,
        violations: Sequence[Violation] = (),
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.violations = tuple(violations)


class ConfigError(InvalidInputError):
    """A configuration is wrong; `violations` name the keys. gRPC: INVALID_ARGUMENT with BadRequest details."""

    reason = "INVALID_CONFIG"

    @classmethod
    def of(cls, violations: Sequence[Violation]) -> ConfigError:
        """Builds the error whose message lists the violations, one a line."""
        return cls("\n".join(map(str, violations)), violations=violations)


class NotFoundError(SurogateError, LookupError):
    """A named thing does not exist. gRPC: NOT_FOUND."""

    reason = "NOT_FOUND"


class AlreadyExistsError(SurogateError):
    """A thing of that name exists and is different. gRPC: ALREADY_EXISTS."""

    reason = "ALREADY_EXISTS"


class FailedPreconditionError(SurogateError):
    """The system is not in the state that the call needs. gRPC: FAILED_PRECONDITION."""

    reason = "FAILED_PRECONDITION"


class OutOfRangeError(SurogateError, ValueError):
    """A step, offset or index is past what is there. gRPC: OUT_OF_RANGE."""

    reason = "OUT_OF_RANGE"


class BusyError(SurogateError):
    """Queues or memory are full; try again after `retry_after` seconds. gRPC: RESOURCE_EXHAUSTED with RetryInfo."""

    reason = "BUSY"

    def __init__(self, message: str, *, retry_after: float = 1.0, reason: str | None = None) -> None:
        super().__init__(message, reason=reason)
        self.retry_after = retry_after


class UnavailableError(SurogateError, ConnectionError):
    """A service cannot be reached or is going away. gRPC: UNAVAILABLE."""

    reason = "UNAVAILABLE"


class DeadlineError(SurogateError, TimeoutError):
    """Something took longer than it was allowed to. gRPC: DEADLINE_EXCEEDED."""

    reason = "DEADLINE_EXCEEDED"


class CancelledError(SurogateError):
    """Somebody asked to stop it. gRPC: CANCELLED. (asyncio's own CancelledError is another thing.)"""

    reason = "CANCELLED"


class DataLossError(SurogateError, OSError):
    """Bytes are missing or are not what they should be. gRPC: DATA_LOSS."""

    reason = "DATA_LOSS"


class UnauthenticatedError(SurogateError, PermissionError):
    """No token, or a wrong one. gRPC: UNAUTHENTICATED."""

    reason = "UNAUTHENTICATED"


class PermissionDeniedError(SurogateError, PermissionError):
    """The caller may not do that. gRPC: PERMISSION_DENIED."""

    reason = "PERMISSION_DENIED"


class UnimplementedError(SurogateError, NotImplementedError):
    """The service does not have that method or feature. gRPC: UNIMPLEMENTED."""

    reason = "UNIMPLEMENTED"


class InternalError(SurogateError, RuntimeError):
    """A fault of ours or of a library under us. gRPC: INTERNAL."""

    reason = "INTERNAL"
