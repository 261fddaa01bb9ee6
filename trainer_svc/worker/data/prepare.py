"""The data of a session: what is trained on and what is held out, encoded once and kept in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from surogate.config.data import ChatKeys, Dataset, TextDataset
from surogate.config.train import TrainConfig
from surogate.errors import InvalidInputError
from trainer_svc.worker.data import cache
from trainer_svc.worker.data.chat import Rendered
from trainer_svc.worker.data.encode import Truncation, batched, encode, fit
from trainer_svc.worker.data.kinds import RenderRow, known_kind, row_renderer
from trainer_svc.worker.data.rows import Row, Rows, Source, find
from trainer_svc.worker.data.store import DocumentWriter, EncodedData
from trainer_svc.worker.errors import config_error
from trainer_svc.worker.model.batch import Document

Warn = Callable[[str], None]

FORMAT = 3
"""Raised with every change of what rows become, so that nothing of before is taken from the cache."""

TRAINING, HELD_OUT = "training", "held_out"
"""Folders of a cached entry."""


@dataclass(frozen=True)
class Counts:
    """What became of the rows of one dataset. `documents` and what follows count the training data alone."""

    key: str
    path: str
    kind: str
    rows: int
    too_long: int
    empty: int
    held_out: int
    documents: int
    tokens: int
    learned: int
    longest: int


@dataclass(frozen=True)
class SessionData:
    """`held_out` is None when nothing is evaluated. `cached` says that nothing had to be tokenized."""

    training: EncodedData
    held_out: EncodedData | None
    counts: tuple[Counts, ...]
    cached: bool
    folder: Path


def prepare(train: TrainConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, warn: Warn) -> SessionData:
    """Reads and encodes `datasets` and `validation_datasets`, or a part of the former; or finds them in the cache.

    Raises ConfigError naming the key that is wrong, DataLossError when the tokens cannot be written.
    """
    if not train.datasets:
        raise config_error("datasets", "names no dataset; give at least one")
    if len(tokenizer) > vocab_size:
        warn(f"the tokenizer knows {len(tokenizer)} tokens and the model {vocab_size}; ids beyond it fail the job")
    training = [find(entry, f"train.datasets.{i}") for i, entry in enumerate(train.datasets)]
    validation = [
        find(entry, f"train.validation_datasets.{i}") for i, entry in enumerate(train.validation_datasets or ())
    ]
    built: list[Path] = []

    def build(folder: Path) -> Mapping[str, Any]:
        built.append(folder)
        return _Encoder(train, tokenizer, vocab_size).write(training, validation, folder)

    parts = _depends_on(train, tokenizer, vocab_size, [*training, *validation])
    folder, meta = cache.fetch(cache.key_of(parts), build)
    for text in meta["warnings"]:
        warn(text)
    held_out = EncodedData.load(folder / HELD_OUT)
    return SessionData(
        EncodedData.load(folder / TRAINING),
        held_out if len(held_out) else None,
        tuple(Counts(**counts) for counts in meta["counts"]),
        cached=not built,
        folder=folder,
    )


def _depends_on(
    train: TrainConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, sources: Sequence[Source]
) -> dict[str, Any]:
    """All that the tokens depend on."""
    keys = {name: getattr(train, name) for name in (*ChatKeys.model_fields, "sequence_len", "eval_seed")}
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("datasets", "jinja2", "tokenizers", "transformers")},
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "vocab_size": vocab_size,
        "keys": keys,
        "held_out": 0 if train.validation_datasets else train.validation_split_ratio,
        "sources": [[source.key, source.entry.model_dump(), source.identity] for source in sources],
    }


class _Encoder:
    """Encodes datasets under one configuration."""

    def __init__(self, train: TrainConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self._train = train
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._warnings: list[str] = []

    def write(self, training: Sequence[Source], validation: Sequence[Source], folder: Path) -> Mapping[str, Any]:
        """Writes all documents, dataset after dataset; returns what is to be known of them.

        Raises ConfigError if a dataset leaves nothing to learn.
        """
        generator = np.random.default_rng(self._train.eval_seed)
        ratio = 0.0 if validation else self._train.validation_split_ratio
        with DocumentWriter(folder / TRAINING) as learned, DocumentWriter(folder / HELD_OUT) as held:
            counts = []
            for source in training:
                rows = source.read()
                counts.append(self._dataset(source.entry, rows, _held_rows(len(rows), ratio, generator), learned, held))
            for source in validation:
                rows = source.read()
                self._dataset(source.entry, rows, np.zeros(len(rows), dtype=np.bool_), held, held)
            if ratio and not held.count:
                self._warnings.append(
                    "nothing of the data was held out, so nothing is evaluated: there are too few rows, or those that "
                    "were chosen leave nothing to learn"
                )
        return {"counts": [asdict(item) for item in counts], "warnings": self._warnings}

    def _limit(self, entry: Dataset) -> int:
        if isinstance(entry, TextDataset):
            return self._train.sequence_len
        return min(self._train.max_length or self._train.sequence_len, self._train.sequence_len)

    def _dataset(
        self, entry: Dataset, rows: Rows, held_rows: npt.NDArray[np.bool_], writer: DocumentWriter, held: DocumentWriter
    ) -> Counts:
        """Writes the documents of one dataset. Raw text is always split: all of it is learned."""
        entry = known_kind(entry, rows)
        render = row_renderer(entry, rows, self._train, self._tokenizer)
        raw_text = isinstance(entry, TextDataset)
        strategy: Truncation = "split" if raw_text else self._train.truncation_strategy
        limit, too_long, empty = self._limit(entry), 0, 0
        documents = tokens = learned = longest = 0
        for number, whole in enumerate(self._whole(rows, render, raw_text)):
            parts = [part for part in fit(whole, limit, strategy) if len(part.trained)]
            for part in parts:
                (held if held_rows[number] else writer).add(part)
            too_long += len(whole) > limit and not raw_text
            empty += len(whole) <= limit and not parts
            longest = max(longest, len(whole))
            if not held_rows[number]:
                documents += len(parts)
                tokens += sum(len(part) for part in parts)
                learned += sum(len(part.trained) for part in parts)
        self._tell(rows, limit, strategy, too_long, empty)
        if not documents:
            raise rows.error(
                "path",
                f"{entry.path} leaves nothing to learn: all {len(rows)} rows are empty, longer than {limit} tokens, "
                "or without an answer",
            )
        return Counts(
            rows.key,
            entry.path,
            entry.type,
            len(rows),
            too_long,
            empty,
            int(held_rows.sum()),
            documents,
            tokens,
            learned,
            longest,
        )

    def _tell(self, rows: Rows, limit: int, strategy: Truncation, too_long: int, empty: int) -> None:
        if too_long:
            self._warnings.append(
                f"{rows.key}: {too_long} of {len(rows)} rows are longer than {limit} tokens and were {_DONE[strategy]}"
            )
        if empty:
            self._warnings.append(f"{rows.key}: {empty} of {len(rows)} rows have nothing to learn and were left out")

    def _whole(self, rows: Rows, render: RenderRow, raw_text: bool) -> Iterator[Document]:
        """A document for every row, in their order."""
        number = 0
        for batch in batched(self._rendered(rows, render, row, number) for number, row in enumerate(rows)):
            documents = encode(batch, self._tokenizer, raw_text=raw_text)
            for _ in batch:
                number += 1
                try:
                    document = next(documents)
                except InvalidInputError as error:
                    raise rows.error("path", f"row {number} {error.message}") from error
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


def _held_rows(count: int, ratio: float, generator: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which rows of a dataset are held out, chosen by `eval_seed`; a dataset of one row is trained on whole."""
    held = np.zeros(count, dtype=np.bool_)
    if ratio:
        size = min(max(1, round(ratio * count)), count - 1)
        held[generator.permutation(count)[:size]] = True
    return held


_DONE = {"delete": "left out", "split": "split", "left": "cut at the start", "right": "cut at the end"}
"""What each strategy does, for people."""
