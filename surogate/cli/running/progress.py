"""What is known of a job from its events so far: what the displays and the last table show."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

from surogate.client.jobs import state_name
from surogate.telemetry import metrics as names
from surogate.v1 import job_pb2

VALIDATION = "validation"
"""Name under which held-out data of PT and SFT is evaluated."""

PHASES = {
    "generate": names.TIME_GENERATE,
    "score": names.TIME_SCORE,
    "train": names.TIME_TRAIN,
    "push": names.TIME_PUSH,
    "idle": names.TIME_IDLE,
}
_RECENT = 20


@dataclass
class Mean:
    """A running mean."""

    total: float = 0.0
    number: int = 0

    def add(self, value: float) -> None:
        """Takes a value in."""
        self.total += value
        self.number += 1

    @property
    def value(self) -> float:
        """The mean; 0 of nothing."""
        return self.total / self.number if self.number else 0.0


@dataclass
class Progress:
    """State of a job as its events tell it. Times are seconds."""

    state: str = "queued"
    status_message: str = ""
    step: int = 0
    max_steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest value of each metric."""
    first_metrics: dict[str, float] = field(default_factory=dict)
    """The first value of each metric."""
    phases: dict[str, Mean] = field(default_factory=dict)
    """Seconds per step by phase, and `step` for the whole; replayed steps left out."""
    evaluations: dict[str, list[job_pb2.EvaluationCompleted]] = field(default_factory=dict)
    """Evaluations by environment, in order of steps."""
    pushes: int = 0
    push_seconds: Mean = field(default_factory=Mean)
    push_pause: Mean = field(default_factory=Mean)
    push_bytes: int = 0
    """Bytes to each replica in the newest push."""
    samples: dict[int, list[job_pb2.Sample]] = field(default_factory=dict)
    """Samples shown, by step."""
    last_sequence: int = 0
    _at_pace: bool = False
    _step_times: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def apply(self, event: job_pb2.JobEvent) -> None:
        """Takes an event in. Events come in the order of their sequence."""
        self.last_sequence = event.sequence
        kind = event.WhichOneof("event")
        if kind == "state_changed":
            self.state = state_name(event.state_changed.state)
            self.status_message = event.state_changed.status_message
            self._at_pace = False
        elif kind == "step_completed":
            self._step(event.step_completed, event.time.ToMicroseconds() / 1e6)
        elif kind == "evaluation_completed":
            self._evaluation(event.evaluation_completed)
        elif kind == "weights_pushed":
            self._push(event.weights_pushed)
        elif kind == "samples_shown":
            self.samples.setdefault(event.samples_shown.step, []).extend(event.samples_shown.samples)

    @property
    def eta(self) -> float | None:
        """Seconds to the last step, from the pace of the last steps; None while not known, as it is when something else
        than training was said to happen since, and after the last step."""
        times = sorted(b - a for (_, a), (_, b) in pairwise(self._step_times))
        if not times or self.step >= self.max_steps or not self._at_pace:
            return None
        return times[len(times) // 2] * (self.max_steps - self.step)

    def _step(self, step: job_pb2.StepCompleted, time: float) -> None:
        self.step, self.max_steps = step.step, step.max_steps or self.max_steps
        values = dict(step.metrics)
        self.metrics.update(values)
        self.first_metrics = values | self.first_metrics
        if step.replayed:
            return
        self._at_pace = True
        self._step_times.append((step.step, time))
        for phase, name in {**PHASES, "step": names.TIME_STEP}.items():
            if name in values:
                self.phases.setdefault(phase, Mean()).add(values[name])

    def _evaluation(self, evaluation: job_pb2.EvaluationCompleted) -> None:
        known = self.evaluations.setdefault(evaluation.environment, [])
        known[:] = [item for item in known if item.step != evaluation.step]  # a restart may evaluate again
        known.append(evaluation)
        known.sort(key=lambda item: item.step)

    def _push(self, push: job_pb2.WeightsPushed) -> None:
        self.pushes += 1
        self.push_seconds.add(push.seconds)
        self.push_pause.add(push.pause_seconds)
        self.push_bytes = push.num_bytes
