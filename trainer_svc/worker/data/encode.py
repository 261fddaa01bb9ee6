"""Rendered text to documents: token ids, which of them are learned, and what is done with those that are too long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from trainer_svc.worker.data.chat import Rendered
from trainer_svc.worker.data.long_text import WINDOW, tokenize
from trainer_svc.worker.model.batch import Document, Mask

Truncation = Literal["delete", "left", "right", "split"]


MAX_BATCH_ROWS = 1000
MAX_BATCH_CHARACTERS = 500_000
"""Texts that are tokenized at a time; a tokenizer's answer takes some hundred times the memory of the ids."""


def batched(rendered: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    """The texts in lists of a bounded size."""
    batch: list[Rendered] = []
    characters = 0
    for item in rendered:
        batch.append(item)
        characters += len(item.text)
        if len(batch) == MAX_BATCH_ROWS or characters >= MAX_BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, *, raw_text: bool) -> Iterator[Document]:
    """Tokenizes texts, one document each. Raw text is ended by the end-of-sequence token.

    A token is learned when it begins within a learned range, or in blanks before one: a word may be one token with the
    blank that a prompt ends with. Tokens that stand for no characters (those that a tokenizer puts around a text) are
    not.
    """
    special = any(item.special_tokens for item in rendered)
    partly = any(item.learned for item in rendered)
    short = [item.text for item in rendered if len(item.text) <= WINDOW]
    encoded = tokenizer(
        short or [""],
        add_special_tokens=special,
        return_offsets_mapping=partly,
        return_attention_mask=False,
        verbose=False,
    )
    ids, offsets = iter(encoded["input_ids"]), iter(encoded["offset_mapping"] if partly else ())
    for item in rendered:
        if len(item.text) > WINDOW:
            found = tokenize(item.text, tokenizer, special_tokens=special)
            tokens, places = found.ids, found.offsets
        else:
            tokens = np.array(next(ids), dtype=np.int64)
            places = np.array(next(offsets) if partly else (), dtype=np.int64).reshape(-1, 2)
        mask = _learned(item, places) if item.learned else np.full(len(tokens), item.learned is None, dtype=np.bool_)
        eos = tokenizer.eos_token_id
        if raw_text and eos is not None and (not len(tokens) or tokens[-1] != eos):
            tokens = np.append(tokens, eos)
            mask = np.append(mask, True)
        yield Document(tokens, mask)


def _learned(item: Rendered, offsets: npt.NDArray[np.int64]) -> Mask:
    mask = np.zeros(len(offsets), dtype=np.bool_)
    starts = offsets[:, 0]
    real = offsets[:, 1] > starts
    for start, end in item.learned or ():
        blank = len(item.text[:start].rstrip())
        begins = (starts >= start) | ((starts >= blank) & (offsets[:, 1] > start))
        mask |= real & begins & (starts < end)
    return mask


def fit(document: Document, limit: int, strategy: Truncation) -> list[Document]:
    """The document if it has at most `limit` tokens; else what the strategy makes of it.

    `delete` nothing, `left` its end, `right` its beginning. `split` pieces that overlap by one token, which the later
    piece sees and does not learn: so every token is learned once.
    """
    length = len(document)
    if length <= limit:
        return [document]
    if strategy == "delete" or limit < 2:
        return []
    if strategy == "left":
        return [_part(document, length - limit, length)]
    if strategy == "right":
        return [_part(document, 0, limit)]
    return [_part(document, start, start + limit) for start in range(0, length - 1, limit - 1)]


def _part(document: Document, start: int, end: int) -> Document:
    return Document(document.token_ids[start:end], document.mask[start:end])
