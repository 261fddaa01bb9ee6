"""Rendered text to documents: token ids, which of them are learned, and what is done with those that are too long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer_svc.worker.data.chat import Rendered
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

    A token is learned when it begins within a learned range. Tokens that stand for no characters (those that a
    tokenizer puts around a text) are not.
    """
    special = any(item.special_tokens for item in rendered)
    partly = any(item.learned for item in rendered)
    encoded = tokenizer(
        [item.text for item in rendered],
        add_special_tokens=special,
        return_offsets_mapping=partly,
        return_attention_mask=False,
        verbose=False,
    )
    for index, (item, ids) in enumerate(zip(rendered, encoded["input_ids"], strict=True)):
        tokens = np.array(ids, dtype=np.int64)
        mask = _learned(item, encoded["offset_mapping"][index]) if item.learned else _all_or_none(item, len(ids))
        if raw_text and tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            tokens = np.append(tokens, tokenizer.eos_token_id)
            mask = np.append(mask, True)
        yield Document(tokens, mask)


def _all_or_none(item: Rendered, length: int) -> Mask:
    return np.full(length, item.learned is None, dtype=np.bool_)


def _learned(item: Rendered, pairs: Sequence[tuple[int, int]]) -> Mask:
    offsets = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    mask = np.zeros(len(offsets), dtype=np.bool_)
    starts = offsets[:, 0]
    real = offsets[:, 1] > starts
    for start, end in item.learned or ():
        mask |= real & (starts >= start) & (starts < end)
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
