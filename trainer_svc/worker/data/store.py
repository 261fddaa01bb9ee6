"""Encoded documents in three flat arrays, so that millions of them cost no more than their tokens."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from trainer_svc.worker.batch import Document


class EncodedData:
    """A sequence of documents. `lengths[i]` is the number of tokens of document i."""

    def __init__(self, documents: Iterable[Document]) -> None:
        tokens, masks, lengths = [], [], []
        for document in documents:
            tokens.append(document.token_ids.astype(np.int32))
            masks.append(document.mask)
            lengths.append(len(document))
        self._tokens = np.concatenate(tokens) if tokens else np.zeros(0, np.int32)
        self._mask = np.concatenate(masks) if masks else np.zeros(0, np.bool_)
        self.lengths: npt.NDArray[np.int64] = np.array(lengths, dtype=np.int64)
        self._ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Document:
        end = self._ends[index]
        part = slice(end - self.lengths[index], end)
        return Document(self._tokens[part].astype(np.int64), self._mask[part])
