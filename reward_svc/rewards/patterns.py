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


MAX_ITEMS = 200_000
"""Items that the counts of a pattern, `a{1000}`, may come to: the package writes them out when it compiles."""

_ITEM = regex.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(\d+)[^{}]*\}|.", regex.DOTALL)


@lru_cache(maxsize=1024)
def compiled(pattern: str, flags: tuple[str, ...] = ()) -> Any:
    """The compiled pattern. Raises ValueError if it is none."""
    if _items(pattern) > MAX_ITEMS:
        raise ValueError(f"{pattern[:80]!r} repeats too often: it stands for more than {MAX_ITEMS:,} items")
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


def _items(pattern: str) -> int:
    """About how many items a pattern comes to when the least counts of its parts are written out."""
    groups, last = [0], 1
    for item in _ITEM.finditer(pattern):
        if item[1]:
            groups[-1] += last * (int(item[1][:9]) - 1)
            last *= int(item[1][:9])
        elif item[0] == "(":
            groups.append(0)
        elif item[0] == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        else:
            last = 1
            groups[-1] += 1
        if groups[-1] > MAX_ITEMS:
            return groups[-1]
    return sum(groups)
