"""Documents and the packed rows that the model sees.

Legend: T tokens of the row, M trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from trainer_svc.worker.model.attention import Documents, on_device

Tokens = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Document:
    """Token ids [n] and which of them are learned [n]; the first never is, for nothing comes before it."""

    token_ids: Tokens
    mask: Mask

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def trained(self) -> Tokens:
        """Indices of the learned tokens, ascending, all >= 1."""
        return np.flatnonzero(self.mask[1:]) + 1


@dataclass(frozen=True)
class PackedBatch:
    """Documents laid end to end in one row.

    `input_ids[1, T]`; `position_ids[1, T]`, from 0 in each document; `predict[M]`, the positions in the row whose next
    token is learned; `targets[M]`, those tokens; `owner[M]`, the index of the document that each belongs to.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    documents: Documents
    predict: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor

    def to(self, device: torch.device) -> PackedBatch:
        """The same on another device."""
        if device.type == "cpu":
            return self
        return PackedBatch(
            on_device(self.input_ids, device),
            on_device(self.position_ids, device),
            self.documents.to(device),
            on_device(self.predict, device),
            on_device(self.targets, device),
            on_device(self.owner, device),
        )


def collate(
    documents: Sequence[Document],
    *,
    pad_to_multiple_of: int = 1,
    pad_id: int = 0,
    padding_side: Literal["left", "right"] = "right",
    keep_apart: bool = True,
    block: int = 1,
) -> PackedBatch:
    """Lays documents end to end, each one cut before its last learned token: what follows is never looked at.

    Documents that learn nothing are left out of the row (`owner` still counts them). The row is padded to a multiple by
    a document of its own, at its end or, with `padding_side` left, at its beginning. With `keep_apart` false the row is
    one long document: later ones see earlier ones. Raises ValueError when nothing is learned at all.

    `block`: the row is padded to a multiple of this as well; where all documents come to the same number of blocks for
    few tokens more, each is padded at its own end instead, which changes nothing for it: they are of one length then.
    """
    ids, positions, predict, targets, owner, lengths = [], [], [], [], [], []
    start = 0
    filled = _even_length([int(document.trained[-1]) for document in documents if len(document.trained)], block)
    pad_to_multiple_of = math.lcm(pad_to_multiple_of, block)
    for index, document in enumerate(documents):
        trained = document.trained
        if len(trained) == 0:
            continue
        length = filled if filled and keep_apart else int(trained[-1])
        ids.append(document.token_ids[: trained[-1]])
        ids.append(np.full(length - int(trained[-1]), pad_id))
        positions.append(np.minimum(np.arange(length), int(trained[-1]) - 1))  # padding asks for no further positions
        predict.append(trained - 1 + start)
        targets.append(document.token_ids[trained])
        owner.append(np.full(len(trained), index))
        lengths.append(length)
        start += length
    if not lengths:
        raise ValueError("no document of the batch has a token to learn")
    padding = -start % pad_to_multiple_of
    if padding:
        first = padding_side == "left" and keep_apart  # in a row that is one document, nothing may see the padding
        ids.insert(0 if first else len(ids), np.full(padding, pad_id))
        positions.insert(0 if first else len(positions), np.zeros(padding, dtype=np.int64))
        lengths.insert(0 if first else len(lengths), padding)
        predict = [part + padding for part in predict] if first else predict
    row_ids, row_positions = _tensor(ids).unsqueeze(0), _tensor(positions).unsqueeze(0)
    if not keep_apart:
        row_positions, lengths = torch.arange(start + padding).unsqueeze(0), [start + padding]
    return PackedBatch(
        row_ids, row_positions, Documents.of(lengths), _tensor(predict), _tensor(targets), _tensor(owner)
    )


MOST_PADDING = 0.05
"""Padding of documents to one length may take this part of them."""


def _even_length(lengths: Sequence[int], block: int) -> int:
    """The one number of tokens, a multiple of `block`, that documents are padded to; 0 when there is none for them."""
    if block == 1 or not lengths:
        return 0
    even = -(-max(lengths) // block) * block
    return even if even * len(lengths) - sum(lengths) <= MOST_PADDING * sum(lengths) else 0


def _tensor(parts: Sequence[Tokens]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))
