"""Structured logs: text on a terminal, one JSON object a line otherwise; job, step and policy version on every line.

The standard library's loggers (gRPC's, vLLM's, SQLAlchemy's) go the same way, so that a service writes one form.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Literal, TextIO

import structlog

LogFormat = Literal["auto", "text", "json"]
CONTEXT_KEYS = ("job", "step", "policy_version")
_SECRET_KEYS = frozenset({"authorization", "token", "tokens", "password", "api_key", "secret", "aws_secret_access_key"})
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_process_context: dict[str, object] = {}


def get_logger(component: str) -> structlog.stdlib.BoundLogger:
    """A logger whose lines carry `component` (trainer, inference, orchestrator, reward, rpc, …)."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(component=component)
    return logger


def bind(**context: object) -> None:
    """Adds facts (job, step, policy_version, …) to every line of the current task and of tasks that it starts."""
    structlog.contextvars.bind_contextvars(**context)


def bind_process(**context: object) -> None:
    """Adds facts to every line of the process: for a service that works on one job at a time. None removes a fact."""
    _process_context.update(context)
    for key in [key for key, value in _process_context.items() if value is None]:
        del _process_context[key]


@contextmanager
def bound(**context: object) -> Iterator[None]:
    """`bind` for the length of a `with` block."""
    with structlog.contextvars.bound_contextvars(**context):
        yield


def current_context() -> dict[str, object]:
    """The job, step and policy version that a line logged now would carry; those that are known."""
    merged = {**_process_context, **structlog.contextvars.get_contextvars()}
    return {key: merged[key] for key in CONTEXT_KEYS if merged.get(key) is not None}


def configure(log_format: LogFormat = "auto", level: str = "info", stream: TextIO | None = None) -> None:
    """Sets up structlog and the standard library's logging to write to `stream` (standard error). May be repeated."""
    out = stream or sys.stderr
    as_json = log_format == "json" or (log_format == "auto" and not out.isatty())
    handler = logging.StreamHandler(out)
    handler.setFormatter(formatter(as_json, colors=out.isatty()))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_shared(as_json),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def formatter(as_json: bool, *, colors: bool = False) -> logging.Formatter:
    """The `logging.Formatter` of our lines, also for handlers that others set up (files, child processes)."""
    # A plain traceback: the other one shows local variables, keys and tokens among them.
    plain = structlog.dev.plain_traceback
    renderer: Any = (
        structlog.processors.JSONRenderer(default=str)
        if as_json
        else structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)
    )
    closing: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, _redact]
    closing += [structlog.processors.format_exc_info, *([] if as_json else [_tame])]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.ExtraAdder(), _name_as_component, *_shared(as_json)],
        processors=[*closing, renderer],
    )


def _shared(as_json: bool) -> list[Any]:
    return [
        structlog.contextvars.merge_contextvars,
        _add_process_context if not as_json else _add_full_context,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


def _add_process_context(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in _process_context.items():
        event.setdefault(key, value)
    return event


def _add_full_context(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """As `_add_process_context`; in JSON the three keys are always there, null while not known."""
    _add_process_context(logger, method, event)
    for key in CONTEXT_KEYS:
        event.setdefault(key, None)
    return event


def _name_as_component(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    record = event.get("_record")
    if record is not None:
        event.setdefault("component", record.name)
    return event


def _redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        event[key] = _without_secrets(key, value)
    return event


def _without_secrets(key: object, value: Any) -> Any:
    if str(key).lower() in _SECRET_KEYS:
        return "[redacted]"
    if isinstance(value, dict):
        return {name: _without_secrets(name, inner) for name, inner in value.items()}
    return value


def _tame(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Text of others (a reward service's error, a job's label) neither steers the terminal nor looks like a line of its
    own: JSON escapes by itself."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", value).replace("\n", "\n    ")
    return event
