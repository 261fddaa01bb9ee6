"""Keeps held-out prompts out of the training prompts.

A generated prompt belongs to a split by the hash of its text, so that the splits are disjoint for all seeds and sizes.
The rows of a dataset are ranked by hash, and the lowest ranks are held out, so that a small dataset has both.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import xxhash

from surogate.reward.base import Split

ItemT = TypeVar("ItemT")

_EVAL_SHARE = 8  # one generated prompt in 8 is held out
_DRAWS_PER_EXAMPLE = 50  # after that many fruitless draws in a row, per example found, nothing new is left
_MAX_DRAWS = 2_000_000


def text_hash(text: str) -> int:
    """64-bit hash of a text, the same in every process."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def rng_for(environment: str, split: Split, seed: int) -> random.Random:
    """Generator of one split: it depends on nothing but the arguments."""
    return random.Random(f"{environment}/{split.value}/{seed}")  # noqa: S311 - prompts, not secrets


def draw_unique(draw: Callable[[], ItemT], text: Callable[[ItemT], str], split: Split, count: int) -> Iterator[ItemT]:
    """Yields up to `count` different items of a split; fewer where the generator has no more to give."""
    seen: set[int] = set()
    fruitless = 0
    while len(seen) < count and fruitless < min(_DRAWS_PER_EXAMPLE * (len(seen) + 10), _MAX_DRAWS):
        item = draw()
        digest = text_hash(text(item))
        held_out = digest % _EVAL_SHARE == 0
        if held_out != (split is Split.EVAL) or digest in seen:
            fruitless += 1
            continue
        seen.add(digest)
        fruitless = 0
        yield item


def split_rows(rows: Sequence[ItemT], key: Callable[[ItemT], str], split: Split, eval_count: int) -> list[ItemT]:
    """The rows of a split, in their order. Rows of equal key go to the same split.

    One key in ten is held out, at least one and at most `eval_count`; a single key is trained on.
    """
    keys = sorted({key(row) for row in rows}, key=lambda text: (text_hash(text), text))
    held_out = set(keys[: min(eval_count, max(1, len(keys) // 10), len(keys) - 1)])
    return [row for row in rows if (key(row) in held_out) == (split is Split.EVAL)]
