"""The data of a session: what is trained on and what is held out, encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from surogate.config.data import Dataset, TextDataset
from surogate.config.train import TrainConfig
from surogate.errors import InvalidInputError
from trainer_svc.worker.batch import Document
from trainer_svc.worker.data.chat import Rendered
from trainer_svc.worker.data.encode import Truncation, encode, fit
from trainer_svc.worker.data.kinds import RenderRow, known_kind, row_renderer
from trainer_svc.worker.data.rows import Row, Rows, read_rows
from trainer_svc.worker.data.store import EncodedData
from trainer_svc.worker.modeling import config_error

Warn = Callable[[str], None]


@dataclass(frozen=True)
class SessionData:
    """`held_out` is None when nothing is evaluated."""

    training: EncodedData
    held_out: EncodedData | None


def prepare(train: TrainConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, warn: Warn) -> SessionData:
    """Reads and encodes `datasets` and `validation_datasets`, or a part of the former. Raises ConfigError."""
    if not train.datasets:
        raise config_error("datasets", "names no dataset; give at least one")
    if len(tokenizer) > vocab_size:
        warn(f"the tokenizer knows {len(tokenizer)} tokens and the model {vocab_size}; ids beyond it fail the job")
    sources = [(entry, read_rows(entry, f"train.datasets.{i}")) for i, entry in enumerate(train.datasets)]
    encoder = _Encoder(train, tokenizer, vocab_size, warn)
    if train.validation_datasets:
        held = [
            (entry, read_rows(entry, f"train.validation_datasets.{i}"))
            for i, entry in enumerate(train.validation_datasets)
        ]
        return SessionData(encoder.encode(sources), encoder.encode(held))
    if train.validation_split_ratio == 0:
        return SessionData(encoder.encode(sources), None)
    return _split(sources, train, encoder)


def _split(sources: Sequence[tuple[Dataset, Rows]], train: TrainConfig, encoder: _Encoder) -> SessionData:
    """Holds out a part of every dataset's rows, chosen by `eval_seed`; a dataset of one row is trained on whole."""
    generator = np.random.default_rng(train.eval_seed)
    training, held = [], []
    for entry, rows in sources:
        order = generator.permutation(len(rows))
        count = min(max(1, round(train.validation_split_ratio * len(rows))), len(rows) - 1)
        if count:
            held.append((entry, rows.select(np.sort(order[:count]).tolist())))
        training.append((entry, rows.select(np.sort(order[count:]).tolist())))
    return SessionData(encoder.encode(training), encoder.encode(held, may_be_empty=True) if held else None)


class _Encoder:
    """Encodes datasets under one configuration."""

    def __init__(self, train: TrainConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, warn: Warn) -> None:
        self._train = train
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._warn = warn

    def encode(self, sources: Sequence[tuple[Dataset, Rows]], *, may_be_empty: bool = False) -> EncodedData:
        """All documents of the datasets, in their order. Raises ConfigError if one leaves nothing to learn."""
        documents: list[Document] = []
        for entry, rows in sources:
            found = self._dataset(entry, rows)
            if not found and not may_be_empty:
                raise rows.error(
                    "path",
                    f"{entry.path} leaves nothing to learn: all {len(rows)} rows are empty, longer than "
                    f"{self._limit(entry)} tokens, or without an answer",
                )
            documents += found
        return EncodedData(documents)

    def _limit(self, entry: Dataset) -> int:
        if isinstance(entry, TextDataset):
            return self._train.sequence_len
        return min(self._train.max_length or self._train.sequence_len, self._train.sequence_len)

    def _dataset(self, entry: Dataset, rows: Rows) -> list[Document]:
        """The documents of one dataset. Raw text is always split: all of it is learned."""
        entry = known_kind(entry, rows)
        render = row_renderer(entry, rows, self._train, self._tokenizer)
        raw_text = isinstance(entry, TextDataset)
        strategy: Truncation = "split" if raw_text else self._train.truncation_strategy
        limit, documents, too_long, empty = self._limit(entry), [], 0, 0
        for whole in self._whole(rows, render, raw_text):
            parts = [part for part in fit(whole, limit, strategy) if len(part.trained)]
            documents += parts
            too_long += len(whole) > limit and not raw_text
            empty += len(whole) <= limit and not parts
        if too_long:
            self._warn(
                f"{rows.key}: {too_long} of {len(rows)} rows are longer than {limit} tokens and were {_DONE[strategy]}"
            )
        if empty:
            self._warn(f"{rows.key}: {empty} of {len(rows)} rows have nothing to learn and were left out")
        return documents

    def _whole(self, rows: Rows, render: RenderRow, raw_text: bool) -> Iterator[Document]:
        number = 0
        for batch in rows.batches():
            rendered = [self._rendered(rows, render, row, number + offset) for offset, row in enumerate(batch)]
            number += len(batch)
            for document in encode(rendered, self._tokenizer, raw_text=raw_text):
                if len(document) and int(document.token_ids.max()) >= self._vocab_size:
                    raise config_error(
                        "model",
                        f"the tokenizer makes ids of {self._vocab_size} and above, which the model does not have",
                    )
                yield document

    def _rendered(self, rows: Rows, render: RenderRow, row: Row, number: int) -> Rendered:
        try:
            return render(row)
        except InvalidInputError as error:
            if error.reason == "INVALID_CONFIG":
                raise
            raise rows.error("path", f"row {number + 1}: {error.message}") from error


_DONE = {"delete": "left out", "split": "split", "left": "cut at the start", "right": "cut at the end"}
"""What each strategy does, for people."""
