"""Regular expressions that give up in time, by the `regex` package: a pattern may backtrack for longer than the sun
shines, and Python's own `re` cannot be stopped."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import regex

from surogate.errors import DeadlineError

FLAGS = {"ignore_case": regex.IGNORECASE, "multiline": regex.MULTILINE, "dot_all": regex.DOTALL}


@lru_cache(maxsize=1024)
def compiled(pattern: str, flags: tuple[str, ...] = ()) -> Any:
    """The compiled pattern. Raises ValueError if it is none."""
    bits = 0
    for flag in flags:
        bits |= FLAGS[flag]
    try:
        return regex.compile(pattern, bits)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


def find(pattern: str, text: str, *, how: str = "search", flags: Sequence[str] = (), timeout: float = 1.0) -> Any:
    """The match (its last one, for `search`), or None. Raises DeadlineError after `timeout` seconds."""
    expression = compiled(pattern, tuple(flags))
    try:
        if how == "fullmatch":
            return expression.fullmatch(text, timeout=timeout, concurrent=True)
        matches = deque(expression.finditer(text, timeout=timeout, concurrent=True), maxlen=1)
        return matches[0] if matches else None
    except TimeoutError as error:
        raise DeadlineError(f"matching {pattern[:80]!r} took longer than {timeout:g} s") from error
