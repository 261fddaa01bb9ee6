"""Encoded documents in three flat arrays, in memory or in files that are mapped, so that a corpus need not fit into it.

Legend: N tokens in all, n documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from trainer_svc.worker.model.batch import Document

TOKENS, MASK, LENGTHS = "tokens.i32", "mask.u8", "lengths.i64"
"""Files of a folder of documents: token ids, whether each is learned, documents' lengths; little-endian, no header."""


class EncodedData:
    """A sequence of documents. `lengths[i]` is the number of tokens of document i."""

    def __init__(self, documents: Iterable[Document] = ()) -> None:
        """Keeps the documents in memory; see `load` for those on disk."""
        tokens, masks, lengths = [], [], []
        for document in documents:
            tokens.append(document.token_ids.astype(np.int32))
            masks.append(document.mask)
            lengths.append(len(document))
        self._take(
            np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
            np.concatenate(masks) if masks else np.zeros(0, np.bool_),
            np.array(lengths, dtype=np.int64),
        )

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Maps what a `DocumentWriter` wrote; tokens are read from disk when they are asked for. Raises OSError."""
        data = cls.__new__(cls)
        lengths = np.fromfile(folder / LENGTHS, dtype="<i8").astype(np.int64, copy=False)
        data._take(_mapped(folder / TOKENS, "<i4"), _mapped(folder / MASK, np.bool_), lengths)
        return data

    def _take(self, tokens: npt.NDArray[Any], mask: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int64]) -> None:
        self._tokens, self._mask, self.lengths = tokens, mask, lengths
        self._ends = np.cumsum(lengths)
        total = int(self._ends[-1]) if len(lengths) else 0
        if not len(tokens) == len(mask) == total:
            raise OSError(f"the documents' lengths add up to {total} tokens, and there are {len(tokens)}")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return len(self._tokens)

    def __getitem__(self, index: int) -> Document:
        end = self._ends[index]
        part = slice(end - self.lengths[index], end)
        return Document(self._tokens[part].astype(np.int64), np.array(self._mask[part]))


class DocumentWriter:
    """Writes documents into a folder, one after the other, holding no more than one of them in memory."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder's files. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self._files = [(folder / name).open("wb") for name in (TOKENS, MASK, LENGTHS)]
        self.count = 0
        """Documents written."""

    def add(self, document: Document) -> None:
        """Appends a document. Raises OSError."""
        tokens, mask, lengths = self._files
        tokens.write(document.token_ids.astype("<i4").tobytes())
        mask.write(document.mask.tobytes())
        lengths.write(np.array([len(document)], dtype="<i8").tobytes())
        self.count += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()


def _mapped(path: Path, dtype: Any) -> npt.NDArray[Any]:
    """The file as an array; an empty file cannot be mapped."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)
