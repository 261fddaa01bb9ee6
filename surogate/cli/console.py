"""Standard output: tables, and text of others."""

from __future__ import annotations

import sys

from rich.console import Console

from surogate.visible import visible

_UNFOLDED = 10_000
"""Columns, more than any line needs."""


def standard_output() -> Console:
    """A console without colours for numbers; in a file or a pipe nothing is folded: a path stays in one piece."""
    return Console(width=None if sys.stdout.isatty() else _UNFOLDED, highlight=False)


def write_foreign(text: str) -> None:
    """Writes at once text that a model or a worker has made: as it is, but to a terminal what would steer it is spelled
    out."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
