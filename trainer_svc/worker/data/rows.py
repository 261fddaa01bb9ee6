"""Reads the rows of a dataset: files, folders, and names on the hub, by the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError

from surogate.config.data import Dataset
from surogate.errors import ConfigError, Violation
from trainer_svc.worker.paths import is_local

FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
}
"""Reader of the `datasets` library for each ending of a file's name."""

BATCH_ROWS = 1000
"""Rows that are read, and tokenized, at a time."""

Row = Mapping[str, Any]


class Rows:
    """The rows of one entry of `datasets`. `key` is its place in the configuration, such as `train.datasets.0`."""

    def __init__(self, table: Any, key: str) -> None:
        self._table = table
        self.key = key
        self.columns: list[str] = list(table.column_names)

    def __len__(self) -> int:
        return len(self._table)

    def select(self, indices: Sequence[int]) -> Rows:
        """Some of the rows, in that order."""
        return Rows(self._table.select(indices), self.key)

    def batches(self) -> Iterator[list[Row]]:
        """All rows, in lists."""
        rows = iter(self._table)
        while batch := list(islice(rows, BATCH_ROWS)):
            yield batch

    def require(self, field: str, column: str | None) -> None:
        """Raises ConfigError naming the key `field` unless `column`, its value, is a column."""
        if column is not None and column not in self.columns:
            raise self.error(field, f"there is no column `{column}`; the columns are {', '.join(self.columns)}")

    def error(self, field: str, description: str) -> ConfigError:
        """An error that names one key of this dataset."""
        return dataset_error(self.key, field, description)


def dataset_error(key: str, field: str, description: str) -> ConfigError:
    """An error that names `field` of the dataset at `key`."""
    return ConfigError.of([Violation(f"{key}.{field}", description)])


def read_rows(dataset: Dataset, key: str) -> Rows:
    """Reads one dataset, with `subset`, `split` and `samples`. Raises ConfigError naming the key that is wrong."""
    table = (
        _local(dataset, key) if is_local(dataset.path) or Path(dataset.path).suffix in FORMATS else _hub(dataset, key)
    )
    if len(table) == 0:
        raise dataset_error(key, "path", f"{dataset.path} has no rows")
    if dataset.samples is not None and dataset.samples < len(table):
        table = table.select(range(dataset.samples))
    return Rows(table, key)


def _local(dataset: Dataset, key: str) -> Any:
    path = Path(dataset.path).expanduser()
    if not path.exists():
        raise dataset_error(key, "path", f"there is no file or folder {path}")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _split(datasets.load_from_disk(str(path)), dataset, key)
    files = [path] if path.is_file() else _files_of_split(path, dataset.split)
    if not files:
        raise dataset_error(key, "path", f"{path} has no files of these kinds: {', '.join(FORMATS)}")
    endings = {file.suffix.lower() for file in files}
    readers = {FORMATS.get(ending) for ending in endings}
    if None in readers:
        raise dataset_error(key, "path", f"{path} is of an unknown kind; known are {', '.join(FORMATS)}")
    if len(readers) > 1:
        raise dataset_error(key, "path", f"{path} mixes kinds of files ({', '.join(sorted(endings))}); use one kind")
    empty = [file for file in files if file.stat().st_size == 0]
    if len(empty) == len(files):
        raise dataset_error(key, "path", f"{path} is empty")
    options: dict[str, Any] = {"sep": "\t"} if endings == {".tsv"} else {}
    names = [str(file) for file in files if file not in empty]
    try:
        return datasets.load_dataset(readers.pop(), data_files=names, split="train", **options)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise dataset_error(key, "path", f"{path} could not be read: {_cause(error)}") from error


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Files of a folder: those named after the split (`train.jsonl`, `train-0001.parquet`, `train/…`), else all."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in FORMATS and file.is_file())
    named = [file for file in files if any(part.startswith(split) for part in file.relative_to(folder).parts)]
    return named or files


def _hub(dataset: Dataset, key: str) -> Any:
    try:
        return _split(datasets.load_dataset(dataset.path, name=dataset.subset), dataset, key)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise dataset_error(
            key,
            "path",
            f"there is no file or folder {dataset.path}, and it could not be had from the hub: {_cause(error)}",
        ) from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise dataset_error(key, "subset" if dataset.subset else "path", f"{dataset.path}: {_cause(error)}") from error


def _split(loaded: Any, dataset: Dataset, key: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if dataset.split not in loaded:
        raise dataset_error(key, "split", f"there is no split `{dataset.split}`; there are {', '.join(loaded)}")
    return loaded[dataset.split]


def _cause(error: BaseException) -> str:
    """The first line of the error beneath all others: the one that says what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
