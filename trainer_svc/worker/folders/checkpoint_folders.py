"""The folders `checkpoint-<step>/`: which there are, which are whole, and which of them stay."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surogate.errors import DataLossError
from surogate.storage.folders import fingerprint
from surogate.storage.whole import remove_folder

STATE = "trainer_state"
"""What a resume needs beside the model or adapter, in a folder of this name."""
_NAME = re.compile(r"checkpoint-(\d+)")

Warn = Callable[[str], None]


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder, (step, path), newest first. Half-written ones have other names."""
    found = [(step, path) for path in _entries(folder) if (step := step_in(path.name)) is not None]
    return sorted(found, reverse=True)


def step_in(name: str) -> int | None:
    """The step in the name of a checkpoint's folder; None for other names."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def has(folder: Path, step: int) -> bool:
    """Whether there is a checkpoint of that step."""
    return any(number == step for number, _ in checkpoints(folder))


def newest_good(folder: Path, warn: Warn) -> Path | None:
    """The newest checkpoint whose files are all as they were written; a warning for each that is passed over."""
    for _, path in checkpoints(folder):
        try:
            verify(path)
        except DataLossError as error:
            warn(f"{error}; trying the one before it")
            continue
        return path
    return None


def left(folder: Path) -> str:
    """What remains to a run that cannot go on, for people."""
    return "the checkpoints before it are good" if checkpoints(folder) else "there is no checkpoint before it"


def verify(path: Path) -> None:
    """Raises DataLossError if a file of the checkpoint is missing or is not what was written."""
    try:
        listed: Mapping[str, Any] = json.loads((path / STATE / "files.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataLossError(f"{path} is not a complete checkpoint", reason="CHECKPOINT_DAMAGED") from error
    for name, expected in listed.items():
        if not (path / name).is_file() or fingerprint(path / name) != expected:
            raise DataLossError(f"{path} is damaged: {name} is not what was written", reason="CHECKPOINT_DAMAGED")


def state_of(path: Path) -> dict[str, Any]:
    """What `state.json` of a checkpoint says. Raises DataLossError if it cannot be read."""
    try:
        state: dict[str, Any] = json.loads((path / STATE / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataLossError(f"{path} is not a complete checkpoint", reason="CHECKPOINT_DAMAGED") from error
    return state


def forget_old(folder: Path, limit: int, *, step: int, keep_interval: int = 0) -> None:
    """Deletes what is older than the newest `limit` up to `step`, and what an abandoned run left of later steps.

    Multiples of `keep_interval` (0: none) up to `step` stay.
    """
    found = checkpoints(folder)
    stay = kept([number for number, _ in found], limit, step=step, keep_interval=keep_interval)
    for number, path in found:
        if number not in stay:
            remove_folder(path)


def kept(steps: Sequence[int], limit: int, *, step: int, keep_interval: int) -> set[int]:
    """Of the steps that have checkpoints, newest first, those whose checkpoints stay; see `forget_old`."""
    past = [number for number in steps if number <= step]
    return {*past[:limit], *(number for number in past if keep_interval and number % keep_interval == 0)}


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
