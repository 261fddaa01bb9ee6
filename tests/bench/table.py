"""What a benchmark hands back: a table of figures, as text for a terminal, as Markdown, and as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Cell = str | float | int | None


@dataclass(frozen=True)
class Options:
    """How long a benchmark may take."""

    quick: bool = False
    """Tiny sizes and one round: whether it works, not how fast it is."""
    rounds: int | None = None
    """Rounds of each figure; None is the benchmark's own choice."""

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Options:
        return cls(arguments.quick, arguments.rounds)


@dataclass(frozen=True)
class Table:
    """Rows of figures; None is a figure that a row has not."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def records(self) -> list[dict[str, Any]]:
        """Each row by its columns' names."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def lines(self) -> list[str]:
        """Markdown, its columns aligned so that it reads well as text too."""
        texts = [list(self.columns), *([_text(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[column]) for row in texts) for column in range(len(self.columns))]
        rule = ["-" * width for width in widths]
        return [
            "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
            for row in (texts[0], rule, *texts[1:])
        ]


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) or abs(cell) >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.3g}"
