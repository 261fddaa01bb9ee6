"""Log context across the wire: the job, step and policy version that a caller works on go along as metadata, so that
the lines that the server logs for the call carry them too."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from surogate.telemetry import log

_KEYS = {name: "x-surogate-" + name.replace("_", "-") for name in log.CONTEXT_KEYS}
_MAX_LENGTH = 128


def to_metadata() -> tuple[tuple[str, str], ...]:
    """The current log context as call metadata."""
    values = {_KEYS[name]: str(value) for name, value in log.current_context().items()}
    return tuple((key, value) for key, value in values.items() if _is_plain(value))


def bound_from_metadata(metadata: Mapping[str, str]) -> AbstractContextManager[None]:
    """Binds what the caller sent for the length of a `with` block; anything but short printable ASCII is left out."""
    found = {name: value for name, key in _KEYS.items() if (value := metadata.get(key)) and _is_plain(value)}
    return log.bound(**{name: _typed(name, value) for name, value in found.items()}) if found else nullcontext()


def _typed(name: str, value: str) -> object:
    return int(value) if name != "job" and value.isdigit() and len(value) < 19 else value


def _is_plain(value: str) -> bool:
    return len(value) <= _MAX_LENGTH and value.isascii() and value.isprintable()
