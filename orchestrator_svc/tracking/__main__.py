"""`python -m orchestrator_svc.tracking`: reports one job to its trackers until its parent says how the job ended.

On standard input comes the `Spec`, a line, and at the end the job's outcome, a line; without it (the parent is gone)
the job counts as interrupted and goes on later. On standard output goes a line for each thing that a person should
know.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from orchestrator_svc.tracking.backends import INTERRUPTED, TRACKERS, LogFile, Tracker
from orchestrator_svc.tracking.spec import Spec
from orchestrator_svc.tracking.tail import Tail
from surogate.process import die_with_parent
from surogate.rollouts import num_sampled, read_steps, step_files

POLL_SECONDS = 1.0
STOP_SECONDS = 20
"""Time to write out what is left when this process is told to end, or its parent is gone."""

SHOWN_SAMPLES = 8
"""Rollouts of a step that are shown."""

MEMORY = Path(".surogate") / "tracking.json"
"""File in the job's folder: what was reported already, and the ids of runs."""


class Reports:
    """A job's trackers, and how far each thing was reported. A tracker that fails is dropped, and that is said."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._folder = Path(spec.output_dir)
        self._memory: dict[str, Any] = _read(self._folder / MEMORY)
        self._trackers: dict[str, Tracker] = {}
        self._metrics = Tail(self._folder / "metrics.jsonl")
        self._evaluations = Tail(self._folder / "evaluations.jsonl")
        kinds: dict[str, type[Tracker]] = {"log_file": LogFile} if spec.log_file else {}
        kinds |= {name: TRACKERS[name] for name in spec.trackers}
        for name, kind in kinds.items():
            memory = self._memory.setdefault("runs", {}).setdefault(name, {})
            try:
                self._trackers[name] = kind(spec, memory)
            except Exception as error:  # noqa: BLE001 - whatever a library raises, training goes on without it
                _say(f"nothing is reported to {name}: {_first_line(error)}")
        self._save()

    def update(self) -> None:
        """Reports what is new."""
        step = self._memory.get("step", 0)
        for line in self._metrics.new_lines():
            if line["step"] > step:
                step = int(line["step"])
                values = {name: value for name, value in line.items() if name not in ("step", "time")}
                self._each(lambda tracker, v=values, t=line["time"], s=step: tracker.metrics(s, t, v))
        evaluated: dict[str, int] = self._memory.setdefault("evaluated", {})
        for line in self._evaluations.new_lines():
            environment, at = str(line["environment"]), int(line["step"])
            if at > evaluated.get(environment, -1):
                evaluated[environment] = at
                values = _evaluation(environment, line)
                self._each(lambda tracker, v=values, s=at: tracker.metrics(s, time.time(), v))
        if self._spec.samples or self._spec.distributions:
            self._rollouts(step)
        if step != self._memory.get("step", 0) or evaluated:
            self._memory["step"] = step
            self._save()

    def close(self, how: str) -> None:
        """Reports what is left and ends the runs."""
        self.update()
        self._each(lambda tracker: tracker.close(how))

    def _rollouts(self, done: int) -> None:
        """Rollouts of every `interval`-th step that is done."""
        shown = self._memory.get("rollouts", 0)
        for step, _ in step_files(self._folder):
            if step <= shown or step > done or (step - 1) % self._spec.interval:
                continue
            columns = ["prompt", "completion", "reward", "token_ids", "sampled"]
            for _, rows in read_steps(self._folder, first=step, last=step, columns=columns):
                if self._spec.samples:
                    picked = [{name: row[name] for name in columns[:3]} for row in rows[:SHOWN_SAMPLES]]
                    self._each(lambda tracker, p=picked, s=step: tracker.samples(s, p))
                if self._spec.distributions:
                    rewards = [float(row["reward"]) for row in rows]
                    lengths = [float(num_sampled(row)) for row in rows]
                    self._each(lambda tracker, v=rewards, s=step: tracker.distribution(s, "reward", v))
                    self._each(lambda tracker, v=lengths, s=step: tracker.distribution(s, "completion/length", v))
            self._memory["rollouts"] = step

    def _each(self, report: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                report(tracker)
            except Exception as error:  # noqa: BLE001 - whatever a library raises, training goes on without it
                del self._trackers[name]
                _say(f"no longer reported to {name}: {_first_line(error)}")

    def _save(self) -> None:
        path = self._folder / MEMORY
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps(self._memory), encoding="utf-8")
        part.replace(path)


def main() -> int:
    """Reports until standard input says how the job ended, or ends."""
    die_with_parent()
    logging.basicConfig(level=logging.WARNING)
    reports = Reports(Spec.read(sys.stdin.readline()))
    ended = threading.Event()
    outcome = [INTERRUPTED]

    def listen() -> None:
        outcome[0] = sys.stdin.readline().strip() or INTERRUPTED
        ended.set()

    def stop(*_: object) -> None:
        signal.alarm(STOP_SECONDS)  # the end of this process if a tracker does not let go
        ended.set()

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=listen, daemon=True).start()
    while not ended.wait(POLL_SECONDS):
        reports.update()
    reports.close(outcome[0])
    return 0


def _evaluation(environment: str, line: dict[str, Any]) -> dict[str, float]:
    """An evaluation's numbers by the names that job clients see: `eval/<environment>/<name>`."""
    values = {name: value for name, value in line.items() if name not in ("step", "environment", "time")}
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return {f"eval/{environment}/{name.removeprefix('eval/')}": float(value) for name, value in numbers.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (FileNotFoundError, ValueError):
        return {}


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
