"""What the API server's answers mean: objects, or exceptions that say what to do about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from surogate.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    SurogateError,
    UnavailableError,
)


class ApiUnavailableError(UnavailableError):
    """The API server does not answer, or is too busy; `retry_after` is what it asked for, in seconds."""

    reason = "KUBERNETES_UNAVAILABLE"

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ConflictError(FailedPreconditionError):
    """The object has changed, or is not the one that was meant: look again."""

    reason = "KUBERNETES_CONFLICT"


class OverQuotaError(FailedPreconditionError):
    """A ResourceQuota is used up: there is room when others leave it."""

    reason = "KUBERNETES_QUOTA"


class ExpiredError(FailedPreconditionError):
    """The resource version is too old for a watch to begin there: list again."""

    reason = "KUBERNETES_EXPIRED"


def answer_error(error: Any) -> SurogateError:
    """The exception for one of the official client that an answer made it raise."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body or ""
    try:
        status = json.loads(body)
    except ValueError:
        status = {}
    if not isinstance(status, dict):
        status = {}
    headers: Mapping[str, str] = error.headers or {}
    return status_error(error.status or 0, {"message": body or error.reason, **status}, headers.get("Retry-After"))


def status_error(code: int, status: Mapping[str, Any], retry_after: str | None) -> SurogateError:
    """The exception for a Status that the API server answered with."""
    message, reason = str(status.get("message") or f"HTTP {code}"), status.get("reason", "")
    if code == 410 or reason in {"Expired", "Gone"}:
        return ExpiredError(message)
    if code == 404:
        return NotFoundError(message, reason="KUBERNETES_NOT_FOUND")
    if code == 409:
        return AlreadyExistsError(message) if reason == "AlreadyExists" else ConflictError(message)
    if code in {400, 405, 413, 415, 422}:
        return InvalidInputError(f"the API server refuses it: {message}", reason="KUBERNETES_INVALID")
    if code == 403 and "exceeded quota:" in message:
        return OverQuotaError(f"the API server refuses it: {message}")
    if code in {401, 403}:
        return PermissionDeniedError(f"the API server refuses it: {message}", reason="KUBERNETES_FORBIDDEN")
    seconds = (status.get("details") or {}).get("retryAfterSeconds") if retry_after is None else retry_after
    with suppress(TypeError, ValueError):
        return ApiUnavailableError(message, None if seconds is None else float(seconds))
    return ApiUnavailableError(message)


def transport_error(error: Exception) -> SurogateError:
    """The exception for a connection that broke. Raises `error` itself where it is of another kind."""
    from urllib3.exceptions import HTTPError

    if isinstance(error, HTTPError | OSError):
        return ApiUnavailableError(f"the API server cannot be reached: {error}")
    raise error


def parsed(text: bytes) -> dict[str, Any]:
    """What JSON says. Half an answer, or a page of something in between, is as good as none."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        begins = text[:200].decode(errors="replace")
        raise ApiUnavailableError(f"what answers is no API server, or was cut off: {begins!r}")
    return found
