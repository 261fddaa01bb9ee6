"""What was reported of a job to each tracker, kept with the job for the next process that reports."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = Path(".surogate") / "tracking.json"
"""File in the job's folder."""

Done = dict[str, Any]
"""Of one tracker: `run`, what it keeps for itself (such as a run's id), and the last `step` and the like."""


class Memory:
    """Notes of all trackers in one file. Threads may share it; `say` is told, once, if it cannot be written."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._path = folder / FILE
        self._say = say
        self._lock = threading.Lock()
        self._refused = False
        self._trackers: dict[str, Done] = _read(self._path)

    def of(self, tracker: str) -> Done:
        """What is noted of a tracker: a copy, empty if there is nothing."""
        with self._lock:
            return copy.deepcopy(self._trackers.get(tracker, {}))

    def keep(self, tracker: str, done: Done) -> None:
        """Notes what is now done."""
        with self._lock:
            self._trackers[tracker] = copy.deepcopy(done)
            try:
                self._write()
            except OSError as error:
                if not self._refused:
                    self._say(f"what was reported cannot be noted, and may be reported again: {error}")
                self._refused = True

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(f".{self._path.name}.part")
        part.write_text(json.dumps({"trackers": self._trackers}), encoding="utf-8")
        part.replace(self._path)


def _read(path: Path) -> dict[str, Done]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if "trackers" in found:
        trackers: dict[str, Done] = found["trackers"]
        return trackers
    shared = {name: value for name, value in found.items() if name != "runs"}  # as it was written once
    return {name: {**shared, "run": run} for name, run in found.get("runs", {}).items()}
