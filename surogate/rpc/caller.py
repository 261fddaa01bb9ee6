"""Who makes the call that is being handled, by the name of its token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

from surogate.telemetry import log

_caller: ContextVar[str] = ContextVar("caller", default="")


def caller() -> str:
    """The name beside the caller's token; empty where it has none, and outside of calls."""
    return _caller.get()


def calling(name: str) -> AbstractContextManager[None]:
    """Makes `name` the caller for the length of a `with` block, in what is logged too."""
    return _calling(name) if name else nullcontext()


@contextmanager
def _calling(name: str) -> Iterator[None]:
    token = _caller.set(name)
    try:
        with log.bound(client=name):
            yield
    finally:
        _caller.reset(token)
