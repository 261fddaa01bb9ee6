"""Reads the user's own prompts from a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from surogate.reward.arguments import bad_argument
from surogate.storage.fetch import local

MAX_BYTES = 2**30


def read_rows(path: str, key: str = "dataset") -> list[dict[str, Any]]:
    """Reads a dataset: `.jsonl`, `.json` (a list of objects), `.csv`, or `.txt` (a line is `{"text": line}`).

    Raises InvalidInputError that names `env[].args.<key>` when the file is missing, empty, too large (1 GiB) or wrong.
    """
    file = Path(local(path, f"env[].args.{key}")).expanduser()
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise bad_argument(key, f"{path} is none of {', '.join(sorted(_READERS))}; convert it")
    if not file.is_file():
        raise bad_argument(key, f"no file {file.absolute()} on the machine of the reward service")
    if file.stat().st_size > MAX_BYTES:
        raise bad_argument(key, f"{path} is larger than 1 GiB; split it or use a service of your own")
    try:
        rows = list(reader(file))
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise bad_argument(key, f"{path} cannot be read: {error}") from error
    if not rows:
        raise bad_argument(key, f"{path} has no rows")
    return rows


def column(rows: list[dict[str, Any]], name: str, key: str) -> list[Any]:
    """The values of a column. Raises InvalidInputError that names `env[].args.<key>` when a row lacks it."""
    for number, row in enumerate(rows, start=1):
        if row.get(name) is None:
            raise bad_argument(
                key, f"row {number} has no column {name!r}; it has {', '.join(map(repr, row)) or 'none'}"
            )
    return [row[name] for row in rows]


def _jsonl(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_object(_json(line, f"line {number}"), f"line {number}")


def _json_list(file: Path) -> Iterator[dict[str, Any]]:
    data = _json(file.read_text(encoding="utf-8-sig"), "the file")
    if not isinstance(data, list):
        raise ValueError("expected a list of objects")
    for number, row in enumerate(data, start=1):
        yield _json_object(row, f"item {number}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} (column {error.colno})") from error


def _json_object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not an object")
    return row


def _csv(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines, strict=True)


def _txt(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8-sig") as lines:
        yield from ({"text": line.strip()} for line in lines if line.strip())


_READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json_list,
    ".csv": _csv,
    ".txt": _txt,
}
