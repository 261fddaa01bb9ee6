"""Sets of byte ranges against plain sets of bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from surogate.weights.ranges import RangeSet

LENGTH = 40
ranges = st.lists(st.tuples(st.integers(0, LENGTH), st.integers(0, LENGTH)), max_size=12)


@given(ranges, ranges)
def test_like_a_set_of_bytes(added: list[tuple[int, int]], removed: list[tuple[int, int]]) -> None:
    found, expected = RangeSet(added), {byte for begin, end in added for byte in range(begin, end)}
    for begin, end in removed:
        found.remove(begin, end)
        expected -= set(range(begin, end))
    assert {byte for begin, end in found for byte in range(begin, end)} == expected
    missing = {byte for begin, end in found.missing(LENGTH) for byte in range(begin, end)}
    assert missing == set(range(LENGTH)) - expected
    assert all(found.covers(b, e) == (set(range(b, e)) <= expected) for b in range(LENGTH) for e in range(b, LENGTH))


def test_neighbours_are_merged() -> None:
    assert list(RangeSet([(4, 6), (0, 2), (2, 4), (8, 9)])) == [(0, 6), (8, 9)]
