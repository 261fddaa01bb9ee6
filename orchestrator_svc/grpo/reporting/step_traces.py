"""One trace a step, from the first prompt that is generated for it to its weights on the replicas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from surogate.telemetry.tracing import Trace


class StepTraces:
    """The traces of steps that are not done: generation begins a step while one before it trains."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._open: dict[int, Trace] = {}

    @contextmanager
    def of(self, step: int) -> Iterator[None]:
        """What is done in the block belongs to the step."""
        if step not in self._open:
            self._open[step] = Trace("step", job=self._job, step=step)
        with self._open[step].active():
            yield

    def end(self, step: int) -> None:
        """The step is done."""
        self._open.pop(step).end()
