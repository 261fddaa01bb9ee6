"""Longest common subsequence of two strings, 64 characters a machine word at a time."""

from __future__ import annotations


def lcs_length(a: str, b: str) -> int:
    """Length of the longest common subsequence of `a` and `b`, in characters.

    Bit-parallel (Hyyrö 2004) on Python's integers: O(len(a)·len(b)/64) word operations. Bit i of `rows` is 0 where
    the i-th character of `a` ends a longer subsequence than the character before it.
    """
    if len(a) > len(b):
        a, b = b, a  # the shorter one is in the numbers
    positions: dict[str, int] = {}
    for index, character in enumerate(a):
        positions[character] = positions.get(character, 0) | (1 << index)
    full = (1 << len(a)) - 1
    rows = full
    for character in b:
        matched = rows & positions.get(character, 0)
        rows = ((rows + matched) | (rows - matched)) & full
    return len(a) - rows.bit_count()


def lcs_ratio(a: str, b: str, most: int | None = None) -> float:
    """2·LCS / (len(a) + len(b)), from 0 (nothing in common) to 1 (equal). Two empty strings are equal.

    Of `a` no more than `most` characters are looked at; further ones count as wrong.
    """
    total = len(a) + len(b)
    return 2.0 * lcs_length(a[:most], b) / total if total else 1.0
