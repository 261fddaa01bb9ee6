"""Finds and reads the rows of a dataset: files, folders, and names on the hub, by the `datasets` library."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError

from surogate.config.data import Dataset
from surogate.errors import ConfigError, Violation
from surogate.storage.fetch import local
from surogate.urls import is_url
from trainer_svc.worker.data.broken_line import first_broken_line
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

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files and folders that tell which split they belong to."""

CARD = "README.md"
"""A folder with this file, and `configs:` in it, is read as the hub reads a repository."""

Row = Mapping[str, Any]


class Rows:
    """The rows of one entry of `datasets`. `key` is its place in the configuration, such as `train.datasets.0`."""

    def __init__(self, table: Any, key: str) -> None:
        self._table = table
        self.key = key
        self.columns: list[str] = list(table.column_names)

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[Row]:
        try:
            yield from self._table
        except UnicodeDecodeError as error:
            raise self.error("path", f"has text that is not UTF-8 ({error}): convert it, with iconv say") from error

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


@dataclass(frozen=True)
class Source:
    """A dataset that was found. `identity` changes when its content does; JSON can write it. `read` gives the rows."""

    entry: Dataset
    key: str
    identity: Sequence[Any]
    read: Callable[[], Rows]


def find(dataset: Dataset, key: str) -> Source:
    """Finds one dataset, with `subset`, `split` and `samples`; files are not opened yet.

    Raises ConfigError naming the key that is wrong, as reading does.
    """
    if not is_url(dataset.path) and not is_local(dataset.path) and Path(dataset.path).suffix not in FORMATS:
        table = _load(dataset, key, dataset.path, name=dataset.subset, split=dataset.split)
        return Source(dataset, key, ["hub", table._fingerprint], lambda: _rows(table, dataset, key))
    path = Path(local(dataset.path, f"{key}.path")).expanduser()
    try:
        if not path.exists():
            raise dataset_error(key, "path", f"there is no file or folder {path}")
        files, load = _local(path, dataset, key)
        return Source(dataset, key, [_stamp(file) for file in files], lambda: _rows(load(), dataset, key))
    except OSError as error:
        raise dataset_error(key, "path", f"{error.filename or path} cannot be read: {error.strerror}") from error


def _stamp(file: Path) -> list[Any]:
    found = file.stat()
    return [str(file.resolve()), found.st_size, found.st_mtime_ns]


def _rows(table: Any, dataset: Dataset, key: str) -> Rows:
    if len(table) == 0:
        sliced = "[" in dataset.split
        where = f" in {dataset.split}" if sliced else ""
        raise dataset_error(key, "split" if sliced else "path", f"{dataset.path} has no rows{where}")
    if dataset.samples is not None and dataset.samples < len(table):
        table = table.select(range(dataset.samples))
    return Rows(table, key)


def _local(path: Path, dataset: Dataset, key: str) -> tuple[list[Path], Callable[[], Any]]:
    """The files that the rows are in, and what loads them."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        _no_subset(dataset, key, f"{path} was saved without any")
        return _all_files(path), lambda: _split(datasets.load_from_disk(str(path)), dataset, key)
    if _has_card(path):
        return _all_files(path), lambda: _load(dataset, key, str(path), name=dataset.subset, split=dataset.split)
    if path.is_file():
        _no_subset(dataset, key, f"{path} is a file")
        if _base(dataset.split) != "train":
            raise dataset_error(key, "split", f"is {dataset.split}, and {path} is one file; leave it out")
        files = [path]
    else:
        files = _files_of_split(_subfolder(path, dataset, key), dataset.split, key)
    reader, options = _reader(files, path, key)
    names = {_base(dataset.split): [escape(str(file)) for file in files if file.stat().st_size]}
    return files, lambda: _load(dataset, key, reader, data_files=names, split=dataset.split, **options)


def _no_subset(dataset: Dataset, key: str, why: str) -> None:
    if dataset.subset is not None:
        raise dataset_error(key, "subset", f"is {dataset.subset}, and {why}; leave it out")


def _subfolder(path: Path, dataset: Dataset, key: str) -> Path:
    """The folder of a local dataset's files: with `subset`, the folder of that name in it."""
    if dataset.subset is None:
        return path
    if not (path / dataset.subset).is_dir():
        there = ", ".join(sorted(child.name for child in path.iterdir() if child.is_dir())) or "none"
        raise dataset_error(key, "subset", f"there is no folder `{dataset.subset}` in {path}; there are {there}")
    return path / dataset.subset


def _all_files(folder: Path) -> list[Path]:
    """Its files, in it and below; those that systems and editors hide (`._x`, `.ipynb_checkpoints`) are none."""
    return sorted(
        file
        for file in folder.rglob("*")
        if not any(part.startswith(".") for part in file.relative_to(folder).parts) and file.is_file()
    )


def _has_card(path: Path) -> bool:
    card = path / CARD
    return (
        card.is_file() and re.search(r"(?m)^configs:", card.read_text(encoding="utf-8", errors="replace")) is not None
    )


def _base(split: str) -> str:
    """`train` of `train[:1000]`."""
    return split.partition("[")[0]


def _reader(files: Sequence[Path], path: Path, key: str) -> tuple[str, dict[str, Any]]:
    """The reader of the `datasets` library for files that are all of one kind, and its options."""
    endings = {file.suffix.lower() for file in files}
    readers = {FORMATS.get(ending) for ending in endings}
    if None in readers:
        raise dataset_error(key, "path", f"{path} is of an unknown kind; known are {', '.join(FORMATS)}")
    if len(readers) > 1:
        raise dataset_error(key, "path", f"{path} mixes kinds of files ({', '.join(sorted(endings))}); use one kind")
    if not any(file.stat().st_size for file in files):
        raise dataset_error(key, "path", f"{path} is empty")
    reader = str(readers.pop())
    first = next(file for file in files if file.stat().st_size)
    return reader, _text_columns(first, "\t" if endings == {".tsv"} else ",") if reader == "csv" else {}


def _text_columns(file: Path, separator: str) -> dict[str, Any]:
    """Options by which all that CSV files have is text: nothing is taken for a number, a date or a missing value.

    Nor are first columns taken for an index where rows have more fields than the header, as with a comma at their end.
    """
    options: dict[str, Any] = {"sep": separator, "keep_default_na": False, "index_col": False}
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            columns = next(csv.reader(lines, delimiter=separator), [])
    except (ValueError, csv.Error):  # the reader will say what is wrong with the file
        return options
    if not all(columns) or len(set(columns)) < len(columns):  # it makes names of its own for such columns
        return options
    return {**options, "features": datasets.Features({name: datasets.Value("string") for name in columns})}


def _files_of_split(folder: Path, split: str, key: str) -> list[Path]:
    """Files of a folder that belong to the split, by words in their names and in those of the folders they are in.

    What names no split at all (`part-0.jsonl`) is training data where no file names that.
    """
    files = [file for file in _all_files(folder) if file.suffix.lower() in FORMATS]
    if not files:
        raise dataset_error(key, "path", f"{folder} has no files of these kinds: {', '.join(FORMATS)}")
    wanted = _base(split)
    words = {file: _words(file.relative_to(folder)) for file in files}
    named = [file for file in files if words[file] & set(_synonyms(wanted)) or _tokens(wanted) <= words[file]]
    if not named and wanted == "train":
        others = {word for name in SPLITS for word in SPLITS[name]}
        named = [file for file in files if not words[file] & others]
    if not named:
        there = ", ".join(str(file.relative_to(folder)) for file in files[:5])
        raise dataset_error(key, "split", f"no file in {folder} is named after the split `{wanted}`; there are {there}")
    return named


def _synonyms(split: str) -> tuple[str, ...]:
    return next((words for words in SPLITS.values() if split in words), ())


def _words(path: Path) -> set[str]:
    """`train-00001-of-00003.parquet` gives train, 00001, of, 00003, parquet; `train1.csv` train1, train, csv."""
    found = _tokens(str(path))
    return found | {word.rstrip("0123456789") for word in found} - {""}


def _tokens(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def _load(dataset: Dataset, key: str, loaded: str, **options: Any) -> Any:
    """load_dataset, with errors that name the key."""
    try:
        return datasets.load_dataset(loaded, **options)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise dataset_error(
            key,
            "path",
            f"there is no file or folder {dataset.path}, and it could not be had from the hub: {_cause(error)}",
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        files = [Path(_unescaped(file)) for named in options.get("data_files", {}).values() for file in named]
        cause = first_broken_line(files) or _cause(error)
        if "corresponds to no data" in cause:
            field = "split" if "[" in dataset.split else "path"
            raise dataset_error(key, field, f"{dataset.path} has no rows in {dataset.split}") from error
        if "cast" in cause and len(files) > 1:
            cause = f"its files differ in columns or in their types ({cause})"
        is_split = any(word in cause.lower() for word in ("split", "instruction format", "percent slice"))
        field = "split" if is_split else "subset" if "onfig" in cause else "path"
        raise dataset_error(key, field, f"{dataset.path} could not be read: {cause}") from error


def _unescaped(pattern: str) -> str:
    """The name that `glob.escape` made the pattern of."""
    return re.sub(r"\[([*?[])\]", r"\1", pattern)


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
