"""Standard output for tables."""

from __future__ import annotations

import sys

from rich.console import Console

_UNFOLDED = 10_000
"""Columns, more than any line needs."""


def standard_output() -> Console:
    """A console without colours for numbers; in a file or a pipe nothing is folded: a path stays in one piece."""
    return Console(width=None if sys.stdout.isatty() else _UNFOLDED, highlight=False)
