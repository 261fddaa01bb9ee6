"""Tokenizes a long text window by window, so that memory does not grow with it: a tokenizer takes 300 times its size.

Windows overlap, and are joined where both have the same tokens at the same places for a while. Where a tokenizer cuts
texts into words first, as nearly all do, nothing before such a place has a say in what comes after it: the tokens are
those of the whole text. Where it does not, what text far away would decide is passed over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from surogate.errors import InvalidInputError

WINDOW = 250_000
"""Characters that are tokenized at a time; no text up to this length is cut."""

OVERLAPS = (2_000, 20_000, 100_000)
"""Characters that a window shares with the one before: more where fewer are not enough."""

SAME = 24
"""Tokens before a place, and after it, that both windows must have alike to be joined there."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """Token ids [n], and the first and the last but one character of each [n, 2]."""

    ids: Ids
    offsets: Ids

    def __getitem__(self, part: slice) -> Tokens:
        return Tokens(self.ids[part], self.offsets[part])


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool) -> Tokens:
    """The tokens of a text of any length. Raises InvalidInputError for one that is a single endless word."""
    parts, start = [_window(text, 0, tokenizer)], 0
    while start + WINDOW < len(text):
        end = start + WINDOW
        for overlap in OVERLAPS:
            found = _window(text, end - overlap, tokenizer)
            places = _join(parts[-1], found, end - overlap, end)
            if places is not None:
                break
        else:
            raise InvalidInputError(
                f"has {len(text):,} characters, in which there is no place to cut around character {end:,}: put line "
                "breaks or spaces into it, or leave it out"
            )
        parts[-1] = parts[-1][: places[0]]
        parts.append(found[places[1] :])
        start = end - overlap
    before, after = _around(tokenizer) if special_tokens else ([], [])
    ids = np.concatenate([np.array(before, np.int64), *(part.ids for part in parts), np.array(after, np.int64)])
    offsets = [
        np.zeros((len(before), 2), np.int64),
        *(part.offsets for part in parts),
        np.zeros((len(after), 2), np.int64),
    ]
    return Tokens(ids, np.concatenate(offsets))


def _window(text: str, start: int, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    found = tokenizer(
        text[start : start + WINDOW],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    offsets = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return Tokens(np.array(found["input_ids"], dtype=np.int64), offsets + start)


def _join(left: Tokens, right: Tokens, start: int, end: int) -> tuple[int, int] | None:
    """How many tokens of `left` stay, and how many of `right` go, where both have the characters from `start` to `end`.

    None where they agree nowhere. The middle is tried first.
    """
    middle, step = (start + end) // 2, max(1, (end - start) // 64)
    for away in range(0, (end - start) // 2, step):
        for place in {middle - away, middle + away}:
            a = int(np.searchsorted(left.offsets[:, 0], place))
            b = int(np.searchsorted(right.offsets[:, 0], place))
            if min(a, b) < SAME or a + SAME > len(left.ids) or b + SAME > len(right.ids):
                continue
            near_a, near_b = left[a - SAME : a + SAME], right[b - SAME : b + SAME]
            if np.array_equal(near_a.ids, near_b.ids) and np.array_equal(near_a.offsets, near_b.offsets):
                return a, b
    return None


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    found = tokenizer("a", return_special_tokens_mask=True, return_attention_mask=False)
    ids, special = found["input_ids"], found["special_tokens_mask"]
    first = special.index(0)
    last = len(special) - special[::-1].index(0)
    return ids[:first], ids[last:]
