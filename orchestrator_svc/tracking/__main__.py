"""`python -m orchestrator_svc.tracking`: reports one job to its trackers until its parent says how the job ended.

On standard input comes the `Spec`, a line, and at the end the job's outcome, a line; without it (the parent is gone)
the job counts as interrupted and goes on later. On standard output goes a line for each thing that a person should
know.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from orchestrator_svc.tracking.backends import INTERRUPTED, TRACKERS, LogFile, Tracker
from orchestrator_svc.tracking.memory import Memory
from orchestrator_svc.tracking.spec import LIBRARIES, Spec
from orchestrator_svc.tracking.tail import Tail
from surogate.process import die_with_parent
from surogate.rollouts import num_sampled, read_steps, step_files

POLL_SECONDS = 1.0
STOP_SECONDS = 20
"""Time to write out what is left when this process is told to end, or its parent is gone."""

OPEN_SECONDS = 30.0
"""After so long a tracker that has not opened is spoken of."""

SHOWN_SAMPLES = 8
"""Rollouts of a step that are shown."""


class Reports:
    """How far a job was reported to one tracker. A tracker that fails is dropped, and that is said."""

    def __init__(self, spec: Spec, name: str, kind: type[Tracker], memory: Memory) -> None:
        self._spec = spec
        self._name = name
        self._folder = Path(spec.output_dir)
        self._memory = memory
        self._done = memory.of(name)
        self._metrics = Tail(self._folder / "metrics.jsonl")
        self._evaluations = Tail(self._folder / "evaluations.jsonl")
        self._tracker: Tracker | None = None
        try:
            self._tracker = kind(spec, self._done.setdefault("run", {}))
        except Exception as error:  # noqa: BLE001 - whatever a library raises, training goes on without it
            say(f"nothing is reported to {name}: {_first_line(error)}")
        self._memory.keep(name, self._done)

    def update(self) -> None:
        """Reports what is new."""
        if self._tracker is None:
            return
        first = step = self._done.get("step", 0)
        for line in self._metrics.new_lines():
            if line["step"] > step:
                step = int(line["step"])
                values = {name: value for name, value in line.items() if name not in ("step", "time")}
                self._report(lambda tracker, v=values, t=line["time"], s=step: tracker.metrics(s, t, v))
        evaluated: dict[str, int] = self._done.setdefault("evaluated", {})
        before = dict(evaluated)
        for line in self._evaluations.new_lines():
            environment, at = str(line["environment"]), int(line["step"])
            if at > evaluated.get(environment, -1):
                evaluated[environment] = at
                values = _evaluation(environment, line)
                self._report(lambda tracker, v=values, s=at: tracker.metrics(s, time.time(), v))
        if self._spec.samples or self._spec.distributions:
            self._rollouts(step)
        if step != first or evaluated != before:
            self._done["step"] = step
            self._memory.keep(self._name, self._done)

    def close(self, how: str) -> None:
        """Reports what is left and ends the run."""
        self.update()
        self._report(lambda tracker: tracker.close(how))

    def _rollouts(self, done: int) -> None:
        """Rollouts of every `interval`-th step that is done."""
        shown = self._done.get("rollouts", 0)
        for step, _ in step_files(self._folder):
            if step <= shown or step > done or (step - 1) % self._spec.interval:
                continue
            columns = ["prompt", "completion", "reward", "token_ids", "sampled"]
            for _, rows in read_steps(self._folder, first=step, last=step, columns=columns):
                if self._spec.samples:
                    picked = [{name: row[name] for name in columns[:3]} for row in rows[:SHOWN_SAMPLES]]
                    self._report(lambda tracker, p=picked, s=step: tracker.samples(s, p))
                if self._spec.distributions:
                    rewards = [float(row["reward"]) for row in rows]
                    lengths = [float(num_sampled(row)) for row in rows]
                    self._report(lambda tracker, v=rewards, s=step: tracker.distribution(s, "reward", v))
                    self._report(lambda tracker, v=lengths, s=step: tracker.distribution(s, "completion/length", v))
            self._done["rollouts"] = step

    def _report(self, report: Any) -> None:
        if self._tracker is None:
            return
        try:
            report(self._tracker)
        except Exception as error:  # noqa: BLE001 - whatever a library raises, training goes on without it
            self._tracker = None
            say(f"no longer reported to {self._name}: {_first_line(error)}")


class Job:
    """How the job stands: `outcome` is that of `backends` once `ended` is set."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.outcome = INTERRUPTED

    def listen(self) -> None:
        """Waits for the parent to say how the job ended, or to go away."""
        self.outcome = sys.stdin.readline().strip() or INTERRUPTED
        self.ended.set()


class Reporting(threading.Thread):
    """Reports to one tracker in a thread of its own, so that one that hangs keeps nothing from the others."""

    def __init__(self, spec: Spec, name: str, kind: type[Tracker], memory: Memory, job: Job) -> None:
        super().__init__(name=name, daemon=True)
        self._given = (spec, name, kind, memory)
        self._job = job
        self._opened = threading.Event()

    def run(self) -> None:
        try:
            reports = Reports(*self._given)
            self._opened.set()
            while not self._job.ended.wait(POLL_SECONDS):
                reports.update()
            reports.close(self._job.outcome)
        except Exception as error:
            logging.getLogger("tracking").exception("%s", self.name)
            say(f"no longer reported to {self.name}: {_first_line(error)}")

    def see_opened(self, deadline: float) -> None:
        """Says so if the tracker has not opened by `deadline`, in seconds of the monotonic clock."""
        while not self._opened.wait(POLL_SECONDS) and not self._job.ended.is_set():
            if time.monotonic() > deadline:
                say(f"{self.name} has not answered for {OPEN_SECONDS:g} s; training does not wait for it")
                return

    def see_ended(self, deadline: float) -> bool:
        """Waits until all is reported, or `deadline`; says so and returns false if it is not."""
        self.join(max(0.0, deadline - time.monotonic()))
        if self.is_alive():
            say(f"{self.name} does not answer; what it has not taken is not reported to it")
        return not self.is_alive()


def main() -> int:
    """Reports until standard input says how the job ended, or ends."""
    die_with_parent()
    logging.basicConfig(level=logging.WARNING)
    spec = Spec.read(sys.stdin.readline())
    job, memory = Job(), Memory(Path(spec.output_dir), say)

    def stop(*_: object) -> None:
        signal.alarm(STOP_SECONDS)  # the end of this process if a tracker does not let go
        job.ended.set()

    signal.signal(signal.SIGTERM, stop)
    kinds: dict[str, type[Tracker]] = {"log_file": LogFile} if spec.log_file else {}
    kinds |= {name: TRACKERS[name] for name in spec.trackers}
    for name in spec.trackers:  # one after the other: imports of two threads at once can meet half-made modules
        with suppress(Exception):  # it comes again, and is said, when the tracker is opened
            import_module(LIBRARIES[name])
    reporting = [Reporting(spec, name, kind, memory, job) for name, kind in kinds.items()]
    for thread in (*reporting, threading.Thread(target=job.listen, daemon=True)):
        thread.start()
    opened_by = time.monotonic() + OPEN_SECONDS
    for thread in reporting:
        thread.see_opened(opened_by)
    job.ended.wait()
    ended_by = time.monotonic() + spec.patience
    hanging = [thread for thread in reporting if not thread.see_ended(ended_by)]
    if hanging:
        os._exit(0)  # a library's own farewell would wait for what hangs
    return 0


def _evaluation(environment: str, line: dict[str, Any]) -> dict[str, float]:
    """An evaluation's numbers by the names that job clients see: `eval/<environment>/<name>`."""
    values = {name: value for name, value in line.items() if name not in ("step", "environment", "time")}
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return {f"eval/{environment}/{name.removeprefix('eval/')}": float(value) for name, value in numbers.items()}


def say(text: str) -> None:
    """Tells the parent, which tells people."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
