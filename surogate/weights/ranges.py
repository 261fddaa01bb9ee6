"""Sets of byte ranges: what has arrived, and what is missing."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Range = tuple[int, int]
"""Half-open: first byte, byte after the last."""


class RangeSet:
    """Half-open ranges, kept sorted and merged."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        for begin, end in ranges:
            self.add(begin, end)

    def __iter__(self) -> Iterator[Range]:
        return iter(zip(self._begins, self._ends, strict=True))

    def add(self, begin: int, end: int) -> None:
        """Adds a range, merging it with those that it touches. An empty one changes nothing."""
        if begin >= end:
            return
        first = bisect_left(self._ends, begin)
        last = bisect_right(self._begins, end)
        if first < last:
            begin = min(begin, self._begins[first])
            end = max(end, self._ends[last - 1])
        self._begins[first:last] = [begin]
        self._ends[first:last] = [end]

    def remove(self, begin: int, end: int) -> None:
        """Takes a range out, as far as it is in."""
        if begin >= end:
            return
        kept = [part for b, e in self for part in ((b, min(e, begin)), (max(b, end), e)) if part[0] < part[1]]
        self._begins = [b for b, _ in kept]
        self._ends = [e for _, e in kept]

    def covers(self, begin: int, end: int) -> bool:
        """Whether every byte of the range is in."""
        if begin >= end:
            return True
        index = bisect_right(self._begins, begin) - 1
        return index >= 0 and self._ends[index] >= end

    def missing(self, length: int) -> list[Range]:
        """The gaps in `[0, length)`, sorted."""
        edges = [0, *(edge for pair in self for edge in pair), length]
        return [(b, e) for b, e in zip(edges[::2], edges[1::2], strict=True) if b < e]
