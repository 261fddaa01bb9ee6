"""Documents and the packed rows that the model sees.

Legend: T tokens of the row, M trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from trainer_svc.worker.attention import Documents

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
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.documents.to(device),
            self.predict.to(device),
            self.targets.to(device),
            self.owner.to(device),
        )


def collate(
    documents: Sequence[Document],
    *,
    pad_to_multiple_of: int = 1,
    pad_id: int = 0,
    padding_side: Literal["left", "right"] = "right",
    keep_apart: bool = True,
) -> PackedBatch:
    """Lays documents end to end, each one cut before its last learned token: what follows is never looked at.

    Documents that learn nothing are left out of the row (`owner` still counts them). The row is padded to a multiple by
    a document of its own, at its end or, with `padding_side` left, at its beginning. With `keep_apart` false the row is
    one long document: later ones see earlier ones. Raises ValueError when nothing is learned at all.
    """
    ids, positions, predict, targets, owner, lengths = [], [], [], [], [], []
    start = 0
    for index, document in enumerate(documents):
        trained = document.trained
        if len(trained) == 0:
            continue
        length = int(trained[-1])
        ids.append(document.token_ids[:length])
        positions.append(np.arange(length))
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
        place = 0 if first else len(lengths)
        ids.insert(place, np.full(padding, pad_id))
        positions.insert(place, np.arange(padding))
        lengths.insert(place, padding)
        predict = [part + padding for part in predict] if first else predict
    row_ids, row_positions = _tensor(ids).unsqueeze(0), _tensor(positions).unsqueeze(0)
    if not keep_apart:
        row_positions, lengths = torch.arange(start + padding).unsqueeze(0), [start + padding]
    return PackedBatch(
        row_ids, row_positions, Documents.of(lengths), _tensor(predict), _tensor(targets), _tensor(owner)
    )


def _tensor(parts: Sequence[Tokens]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))
