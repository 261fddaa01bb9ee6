"""`metrics.jsonl`: one JSON object per optimiser step, in order, each step once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path


class MetricsFile:
    """Appends steps; every call is on disk when it returns. Lines that a crash cut short are dropped first."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file. Raises OSError."""
        self._path = path
        self.last_step = 0
        """Step of the last line; 0 when there is none."""
        self.truncate(None)

    def append(self, steps: Iterable[tuple[int, float, Mapping[str, float]]]) -> None:
        """Adds lines `{"step", "time", **metrics}` for (step, seconds since the epoch, metrics); steps that are there
        already are left out. Numbers that JSON has no word for are left out too. Raises OSError."""
        new = [(step, time, metrics) for step, time, metrics in steps if step > self.last_step]
        if not new:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for step, time, metrics in new:
                known = {name: value for name, value in metrics.items() if math.isfinite(value)}
                file.write(json.dumps({"step": step, "time": round(time, 3), **known}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.last_step = max(step for step, _, _ in new)

    def seconds_since(self, step: int) -> float:
        """Time between the line of `step` (or the first one after it) and the last line. Raises OSError."""
        times = [line["time"] for line in read_metrics(self._path) if line["step"] >= step] if self.last_step else []
        return times[-1] - times[0] if times else 0.0

    def truncate(self, step: int | None) -> None:
        """Drops what comes after `step` (None keeps all) and whatever is not a whole line. Raises OSError."""
        if not self._path.exists():
            self.last_step = 0
            return
        lines = list(_whole_lines(self._path, step))
        part = self._path.with_name(f".{self._path.name}.part")
        with part.open("w", encoding="utf-8") as file:
            file.writelines(text for _, text in lines)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)
        self.last_step = lines[-1][0] if lines else 0


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file as mappings. Raises OSError."""
    return [json.loads(text) for _, text in _whole_lines(path, None)]


def _whole_lines(path: Path, up_to: int | None) -> Iterable[tuple[int, str]]:
    last = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                step = int(json.loads(text)["step"])
            except (ValueError, KeyError, TypeError):
                continue
            if text.endswith("\n") and step > last and (up_to is None or step <= up_to):
                last = step
                yield step, text
