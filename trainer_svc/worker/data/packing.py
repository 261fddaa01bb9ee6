"""Packing: which documents share a row. Pure functions of the lengths."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

WINDOW = 8192
"""Documents that are packed together; a window is packed before the next is looked at."""


def pack(lengths: Sequence[int], capacity: int, *, window: int = WINDOW) -> list[list[int]]:
    """Best-fit decreasing: rows of document indices whose lengths (each 1 to `capacity`) sum to at most `capacity`.

    Within a window the longest document goes first, each into the fullest row that still has room for it. The result
    depends on the lengths and their order alone. Every row lists its documents in their order.
    """
    rows: list[list[int]] = []
    for start in range(0, len(lengths), window):
        part = range(start, min(start + window, len(lengths)))
        rows += _pack_window(part, lengths, capacity)
    return rows


def _pack_window(documents: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), ascending: the first with enough room is the fullest
    for document in sorted(documents, key=lambda index: (-lengths[index], index)):
        length = lengths[document]
        if not 1 <= length <= capacity:
            raise ValueError(f"document {document} has {length} tokens; 1 to {capacity} fit into a row")
        place = bisect.bisect_left(open_rows, (length, -1))
        if place == len(open_rows):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = open_rows.pop(place)
        rows[row].append(document)
        if room > length:
            bisect.insort(open_rows, (room - length, row))
    return [sorted(row) for row in rows]


def efficiency(lengths: Sequence[int], rows: Sequence[Sequence[int]], capacity: int) -> float:
    """Part of the rows' room that documents fill, in (0, 1]."""
    return sum(lengths) / (len(rows) * capacity) if rows else 1.0
