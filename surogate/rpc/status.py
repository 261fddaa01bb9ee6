"""Domain exceptions to `google.rpc.Status` and back. This is the only place that knows both sides."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from surogate import errors

DOMAIN = "surogate.dev"
STATUS_KEY = "grpc-status-details-bin"
CODE_KEY = "grpc_code"
"""ErrorInfo metadata that keeps a gRPC code which no exception class stands for."""

# INVALID_ARGUMENT has two classes, told apart by `_class_of`; every other code has one.
_CODES: tuple[tuple[type[errors.SurogateError], grpc.StatusCode], ...] = (
    (errors.InvalidInputError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFoundError, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (errors.FailedPreconditionError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.OutOfRangeError, grpc.StatusCode.OUT_OF_RANGE),
    (errors.BusyError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.CancelledError, grpc.StatusCode.CANCELLED),
    (errors.DataLossError, grpc.StatusCode.DATA_LOSS),
    (errors.UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDeniedError, grpc.StatusCode.PERMISSION_DENIED),
    (errors.UnimplementedError, grpc.StatusCode.UNIMPLEMENTED),
    (errors.InternalError, grpc.StatusCode.INTERNAL),
)
_CLASS_OF_CODE = {code.value[0]: cls for cls, code in _CODES}
_CODE_OF_NUMBER = {code.value[0]: code for code in grpc.StatusCode}
_MAX_TRAILERS = 7000
"""Bytes; gRPC's clients refuse more than 8,192 of trailing metadata, other headers included."""
_MAX_MESSAGE, _MAX_TEXT = 1200, 400
_CONFIG_CLASS = "ConfigError"
_CLASS_KEY = "class"
_TOO_LARGE = "message larger than max"
"""In the words of gRPC's C core, Node and Go alike."""


def code_of(error: BaseException) -> grpc.StatusCode:
    """The gRPC code that `error` travels as; INTERNAL for whatever is not one of ours."""
    return next((code for cls, code in _CODES if isinstance(error, cls)), grpc.StatusCode.INTERNAL)


def to_status(error: BaseException) -> status_pb2.Status:
    """The status with ErrorInfo always, BadRequest for violations, RetryInfo for BusyError.

    An exception that is not a SurogateError becomes INTERNAL with its class and message, without traceback.
    """
    if not isinstance(error, errors.SurogateError):
        error = errors.InternalError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    return status_pb2.Status(
        code=code_of(error).value[0], message=error.message, details=[_pack(detail) for detail in _details(error)]
    )


def from_status(status: status_pb2.Status) -> errors.SurogateError:
    """The exception that `status` stands for, with its reason, metadata, violations and retry delay.

    A code that no class stands for (ABORTED, UNKNOWN) becomes an InternalError that keeps the message, with the code
    in `metadata["grpc_code"]`.
    """
    found = _Details(status.details)
    cls = _class_of(status.code, found)
    reason = found.info.reason or cls.reason
    metadata = {key: value for key, value in found.info.metadata.items() if key != _CLASS_KEY}
    if issubclass(cls, errors.InvalidInputError):
        return cls(status.message, violations=found.violations, reason=reason, metadata=metadata)
    if issubclass(cls, errors.BusyError):
        busy = cls(status.message, retry_after=found.retry_after or 1.0, reason=reason)
        busy.metadata.update(metadata)
        return busy
    if status.code not in _CLASS_OF_CODE:
        code = _CODE_OF_NUMBER.get(status.code)
        metadata.setdefault(CODE_KEY, code.name if code else str(status.code))
    return cls(status.message, reason=reason, metadata=metadata)


def from_rpc_error(error: grpc.RpcError) -> errors.SurogateError:
    """The exception behind a failed call: its rich status where the server sent one, else its code and details."""
    rich = _rich_status(error)
    if rich is not None:
        return from_status(rich)
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in details.lower():
        return errors.InvalidInputError(
            f"{details}: send less at once, or raise max_message_bytes on both ends", reason="MESSAGE_TOO_LARGE"
        )
    return from_status(status_pb2.Status(code=code.value[0], message=details or code.name.replace("_", " ").lower()))


def fitted(status: status_pb2.Status) -> status_pb2.Status:
    """The status, cut so that clients take it: they refuse trailing metadata of more than 8 KiB, all of it.

    Texts keep their beginnings, and of many violations the first are kept, with one more that says how many there were.
    """
    if status.ByteSize() <= _MAX_TRAILERS and _trailers_size(status) <= _MAX_TRAILERS:
        return status
    small = status_pb2.Status(code=status.code, message=_cut(status.message, _MAX_MESSAGE))
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    violations: list[error_details_pb2.BadRequest.FieldViolation] = []
    for detail in status.details:
        if detail.Unpack(info):
            facts = {_cut(key, 64): _cut(value, _MAX_TEXT) for key, value in list(info.metadata.items())[:4]}
            cut = error_details_pb2.ErrorInfo(reason=info.reason, domain=info.domain, metadata=facts)
            small.details.append(_pack(cut))
        elif detail.Unpack(bad):
            violations = list(bad.field_violations)
        elif detail.Unpack(retry):
            small.details.append(detail)
    room = _MAX_TRAILERS - _trailers_size(small) - 2 * _MAX_TEXT
    kept = error_details_pb2.BadRequest()
    for index, item in enumerate(violations):
        kept.field_violations.add(field=_cut(item.field, _MAX_TEXT), description=_cut(item.description, _MAX_TEXT))
        if _base64(kept.ByteSize()) > room:
            del kept.field_violations[-1]
            kept.field_violations.add(description=f"and {len(violations) - index} more")
            break
    if violations:
        small.details.append(_pack(kept))
    return small


def _trailers_size(status: status_pb2.Status) -> int:
    """Bytes of the trailing metadata: the message percent-encoded, the status in base64."""
    return _encoded(status.message) + _base64(status.ByteSize())


def _base64(size: int) -> int:
    return (size + 2) // 3 * 4


def _encoded(text: str) -> int:
    return sum(1 if " " <= letter <= "~" and letter != "%" else 3 * len(letter.encode()) for letter in text)


def _cut(text: str, limit: int) -> str:
    """The beginning of a text, of at most `limit` bytes when percent-encoded."""
    size = 0
    for index, letter in enumerate(text):
        size += _encoded(letter)
        if size > limit:
            return f"{text[:index]}…"
    return text


def trailing_metadata(status: status_pb2.Status) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata by which gRPC carries a rich status."""
    return ((STATUS_KEY, status.SerializeToString()),)


class _Details:
    """The detail messages that we know, unpacked; others are left alone."""

    def __init__(self, details: Iterable[any_pb2.Any]) -> None:
        self.info = error_details_pb2.ErrorInfo()
        self.violations: list[errors.Violation] = []
        self.retry_after = 0.0
        bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        for detail in details:
            with suppress(DecodeError):  # of a server that is not ours: what it says otherwise still stands
                if detail.Unpack(bad):
                    self.violations += [errors.Violation(v.field, v.description) for v in bad.field_violations]
                elif detail.Unpack(retry):
                    self.retry_after = max(0.0, retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9)
                else:
                    detail.Unpack(self.info)


def _class_of(code: int, found: _Details) -> type[errors.SurogateError]:
    cls = _CLASS_OF_CODE.get(code, errors.InternalError)
    if cls is errors.InvalidInputError and found.info.metadata.get(_CLASS_KEY) == _CONFIG_CLASS:
        return errors.ConfigError
    return cls


def _details(error: errors.SurogateError) -> Iterable[error_details_pb2.ErrorInfo]:
    metadata = dict(error.metadata)
    if isinstance(error, errors.ConfigError):
        metadata[_CLASS_KEY] = _CONFIG_CLASS
    yield error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    if isinstance(error, errors.InvalidInputError) and error.violations:
        yield error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
                for v in error.violations
            ]
        )
    if isinstance(error, errors.BusyError):
        seconds, fraction = divmod(error.retry_after, 1)
        delay = duration_pb2.Duration(seconds=int(seconds), nanos=int(fraction * 1e9))
        yield error_details_pb2.RetryInfo(retry_delay=delay)


def _pack(message: error_details_pb2.ErrorInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _rich_status(error: grpc.RpcError) -> status_pb2.Status | None:
    metadata = cast("Iterable[tuple[str, bytes]]", error.trailing_metadata() or ())
    for key, value in metadata:
        if key != STATUS_KEY:
            continue
        try:
            return status_pb2.Status.FromString(value)
        except DecodeError:  # not a server of ours: its plain code and details say what there is to say
            return None
    return None
