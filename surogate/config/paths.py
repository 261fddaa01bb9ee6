"""Which keys are paths, and how relative ones are made absolute before a job leaves its folder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from surogate.config.base import shown
from surogate.errors import Violation
from surogate.urls import is_url

INPUT_KEYS = (
    "train.model",
    "train.adapter_path",
    "train.template",
    "train.datasets.*.path",
    "train.validation_datasets.*.path",
    "infer.model",
    "orch.model.name",
    "orch.env.*.args.dataset",
    "orch.env.*.args.eval_dataset",
    "orch.eval.env.*.args.dataset",
    "orch.eval.env.*.args.eval_dataset",
)
"""Keys that hold what is read: a file, a folder, or a name on the hub."""
DATA_FILES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
"""Endings of files of data, which no name on the hub has."""
OUTPUT_KEYS = ("train.output_dir", "train.checkpoint_dir", "orch.output_dir")
"""Keys that hold folders to write into."""


def absolute_paths(config: Mapping[str, Any], base: Path, *, outputs: bool = False) -> dict[str, Any]:
    """A job's configuration with its relative paths made absolute.

    Args:
        config: `{kind, train, …}`, before or after it was resolved; it is not changed.
        base: Folder that relative paths start from.
        outputs: Also make folders to write into absolute.

    Inputs are changed only if they exist under `base`: other names are taken for names on the hub, and stay.
    """
    changed = copy.deepcopy(dict(config))
    for key in INPUT_KEYS:
        _change(changed, key.split("."), lambda value: _existing(value, base))
    for key in OUTPUT_KEYS if outputs else ():
        _change(changed, key.split("."), lambda value: _output(value, base))
    return changed


def missing_paths(config: Mapping[str, Any], base: Path) -> list[Violation]:
    """Inputs that are spelled as paths of this machine (`./model`, `a.jsonl`, `~/x`) and are not there."""
    return [
        Violation(key, f"{shown(value)} does not exist")
        for pattern in INPUT_KEYS
        for key, value in _values(config, pattern.split("."))
        if _is_path(value) and not (base / Path(value).expanduser()).exists()
    ]


def unknown_homes(config: Mapping[str, Any]) -> list[Violation]:
    """Paths that begin in the home of another user (`~name/x`), which may have none where the job runs."""
    return [
        Violation(key, f"{shown(value)} is in another user's home: write the path out")
        for pattern in (*INPUT_KEYS, *OUTPUT_KEYS, "train.log_file")
        for key, value in _values(config, pattern.split("."))
        if value.startswith("~") and not (value == "~" or value.startswith("~/"))
    ]


def input_paths(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Inputs that are paths of the machine that reads them, with their keys: by their spelling, or since they exist."""
    return [
        (key, value)
        for pattern in INPUT_KEYS
        for key, value in _values(config, pattern.split("."))
        if _is_path(value) or (not is_url(value) and (value.count("/") > 1 or _exists(value)))
    ]


def _exists(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):  # a chat template in the place of its file may be too long for a name
        return False


def _is_path(value: str) -> bool:
    """Whether a value is spelled as a path, rather than as a name on the hub."""
    return not is_url(value) and (value.startswith((".", "/", "~")) or value.endswith(DATA_FILES))


def _existing(value: str, base: Path) -> str:
    path = base / Path(value).expanduser()
    try:
        return str(path.absolute()) if path.exists() else value
    except OSError:  # a chat template in the place of its file may be too long for a name
        return value


def _output(value: str, base: Path) -> str:
    return value if is_url(value) else str((base / Path(value).expanduser()).absolute())


def _values(data: Any, parts: list[str], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The strings at a dotted key, in which `*` stands for every item of a list, with their own keys."""
    if not parts:
        if isinstance(data, str) and data:
            yield prefix, data
        return
    for name, inner in _children(data, parts[0]):
        yield from _values(inner, parts[1:], f"{prefix}.{name}" if prefix else name)


def _children(data: Any, part: str) -> list[tuple[str, Any]]:
    if part == "*":
        return [(str(index), item) for index, item in enumerate(data)] if isinstance(data, list) else []
    return [(part, data[part])] if isinstance(data, dict) and part in data else []


def _change(data: dict[str, Any], parts: list[str], change: Callable[[str], str]) -> None:
    for key, value in list(_values(data, parts)):
        *blocks, last = key.split(".")
        block: Any = data
        for name in blocks:
            block = block[int(name)] if isinstance(block, list) else block[name]
        block[last] = change(value)
