"""Exit codes, and how errors are told: `error: …` on standard error, a line for each thing, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from surogate.errors import (
    AlreadyExistsError,
    InvalidInputError,
    NotFoundError,
    OutOfRangeError,
    SurogateError,
    UnavailableError,
    Violation,
)
from surogate.visible import visible

OK = 0
FAILED = 1
"""The job failed, or a service could not do what was asked."""
USAGE = 2
"""What was given is wrong: flags, configuration, a job that does not exist."""
INTERRUPTED = 130

_USAGE_ERRORS = (InvalidInputError, NotFoundError, AlreadyExistsError, OutOfRangeError)


def exit_code(error: SurogateError) -> int:
    """The exit code for an error."""
    return USAGE if isinstance(error, _USAGE_ERRORS) else FAILED


def error_lines(error: SurogateError) -> list[str]:
    """What to print: the message, a line for each violation, which the message need not repeat."""
    if not isinstance(error, InvalidInputError) or not error.violations:
        return [f"error: {error.message}"]
    lines = error.message.splitlines()
    lines += [str(violation) for violation in error.violations if violation.description not in error.message]
    return [f"error: {line}" for line in lines]


def report(error: SurogateError) -> int:
    """Prints an error on standard error; returns the exit code."""
    sys.stderr.write("".join(f"{visible(line)}\n" for line in error_lines(error)))
    return exit_code(error)


def usage(key: str, description: str) -> InvalidInputError:
    """The error for a wrong flag or argument."""
    violation = Violation(key, description)
    return InvalidInputError(str(violation), violations=[violation])


class NotReachedError(UnavailableError):
    """A server could not be reached; the message says which, and what to try."""


@contextmanager
def reaching(what: str, target: str, start_with: str) -> Iterator[None]:
    """Turns the failure to reach a server into words on what to try. Within another one, the inner one's words stay."""
    try:
        yield
    except NotReachedError:
        raise
    except UnavailableError as error:
        raise NotReachedError(
            f"cannot reach the {what} at {target}: {error.message}\n"
            f"  Is it running there ({start_with})? Is the address right (HOST:PORT)? With TLS set SUROGATE_TLS_CA or "
            f"SUROGATE_TLS=1.",
            reason=error.reason,
        ) from error
