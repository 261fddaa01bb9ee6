"""Every domain exception survives the way to google.rpc.Status and back."""

from __future__ import annotations

import base64
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from surogate import errors
from surogate.rpc.status import code_of, fitted, from_status, to_status, trailing_metadata

SIMPLE = [
    errors.NotFoundError,
    errors.AlreadyExistsError,
    errors.FailedPreconditionError,
    errors.OutOfRangeError,
    errors.UnavailableError,
    errors.DeadlineError,
    errors.CancelledError,
    errors.DataLossError,
    errors.UnauthenticatedError,
    errors.PermissionDeniedError,
    errors.UnimplementedError,
    errors.InternalError,
]


@pytest.mark.parametrize("cls", SIMPLE)
def test_class_message_reason_and_metadata_survive(cls: type[errors.SurogateError]) -> None:
    given = cls("what happened", reason="A_REASON", metadata={"key": "value"})
    back = from_status(to_status(given))
    assert type(back) is cls
    assert (back.message, back.reason, back.metadata) == ("what happened", "A_REASON", {"key": "value"})


def test_every_exception_class_is_covered() -> None:
    def subclasses(cls: type) -> set[type]:
        return {cls, *(found for sub in cls.__subclasses__() for found in subclasses(sub))}

    ours = {cls for cls in subclasses(errors.SurogateError) if cls.__module__ == "surogate.errors"}
    special = {errors.SurogateError, errors.InvalidInputError, errors.ConfigError, errors.BusyError}
    assert ours == {*SIMPLE, *special}


@pytest.mark.parametrize("cls", [errors.InvalidInputError, errors.ConfigError])
def test_violations_survive_and_the_two_kinds_of_invalid_input_stay_apart(cls: type[errors.InvalidInputError]) -> None:
    violations = (errors.Violation("train.learning_rate", "must be > 0"), errors.Violation("model", "is missing"))
    status = to_status(cls("two things", violations=violations, reason="OTHER"))
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    back = from_status(status)
    assert type(back) is cls
    assert isinstance(back, errors.InvalidInputError)
    assert back.violations == violations
    assert back.metadata == {}


def test_busy_says_when_to_try_again() -> None:
    back = from_status(to_status(errors.BusyError("full", retry_after=2.25)))
    assert isinstance(back, errors.BusyError)
    assert back.retry_after == pytest.approx(2.25)


def test_error_info_is_always_there() -> None:
    info = error_details_pb2.ErrorInfo()
    assert to_status(ValueError("boom")).details[0].Unpack(info)
    assert (info.reason, info.domain) == ("INTERNAL", "surogate.dev")


def test_a_foreign_exception_is_internal_and_shows_no_traceback() -> None:
    status = to_status(ZeroDivisionError("division by zero"))
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert status.message == "ZeroDivisionError: division by zero"


def test_a_code_without_a_class_keeps_its_name_and_message() -> None:
    back = from_status(status_pb2.Status(code=grpc.StatusCode.ABORTED.value[0], message="conflict"))
    assert isinstance(back, errors.InternalError)
    assert back.message == "conflict"
    assert back.metadata == {"grpc_code": "ABORTED"}


def test_codes() -> None:
    assert code_of(errors.ConfigError("x")) is grpc.StatusCode.INVALID_ARGUMENT
    assert code_of(errors.BusyError("x")) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert code_of(KeyError("x")) is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("text", ["x", "ä", "漢", "%\n"])
@pytest.mark.parametrize("count", [1, 3, 1000])
def test_statuses_fit_into_what_clients_take(text: str, count: int) -> None:
    found = [errors.Violation(f"train.{text * index}", text * 2_000) for index in range(count)]
    status = fitted(to_status(errors.ConfigError.of(found)))
    ((_, value),) = trailing_metadata(status)
    assert len(quote(status.message)) + len(base64.b64encode(value)) < 8000
    back = from_status(status)
    assert isinstance(back, errors.ConfigError)
    assert back.violations[0].field == "train."
    assert back.violations[0].description[:1] == text[:1]
    if count == 1000:
        assert back.violations[-1].description == f"and {count - len(back.violations) + 1} more"


def test_a_status_that_fits_is_left_alone() -> None:
    status = to_status(errors.ConfigError.of([errors.Violation("a", "b")]))
    assert fitted(status) is status


def test_a_long_message_keeps_its_retry_delay() -> None:
    back = from_status(fitted(to_status(errors.BusyError("x" * 100_000, retry_after=3))))
    assert isinstance(back, errors.BusyError)
    assert back.retry_after == 3


@pytest.mark.parametrize("kind", ["ErrorInfo", "BadRequest", "RetryInfo", "NothingWeKnow"])
def test_details_that_cannot_be_read_leave_the_rest_standing(kind: str) -> None:
    status = to_status(errors.BusyError("full", retry_after=3))
    status.details.add(type_url=f"type.googleapis.com/google.rpc.{kind}", value=b"\xff\xff")
    back = from_status(status)
    assert isinstance(back, errors.BusyError)
    assert (back.message, back.retry_after) == ("full", 3)


def test_a_negative_retry_delay_is_none() -> None:
    status = status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="full")
    delay = error_details_pb2.RetryInfo()
    delay.retry_delay.seconds = -5
    status.details.add().Pack(delay)
    back = from_status(status)
    assert isinstance(back, errors.BusyError) and back.retry_after == 1.0
