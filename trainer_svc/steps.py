"""GRPO steps by number: the next one is trained, the last one is remembered, everything else is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from surogate.errors import AlreadyExistsError, OutOfRangeError
from trainer_svc.samples import StepSamples

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class _Step:
    number: int
    digest: str
    result: asyncio.Task[Metrics]


class StepSequence:
    """Makes training idempotent by step.

    A repeat of the step in hand waits for the same result, a repeat of the last step gets its stored result; both only
    with the very same samples. A step goes on when its caller leaves: the repeat finds its result. A step that failed
    is forgotten, and can be sent again.
    """

    def __init__(self, done: int) -> None:
        self.done = done
        """Steps done."""
        self._running: _Step | None = None
        self._stored: _Step | None = None

    def check(self, step: int) -> None:
        """Raises OutOfRangeError unless `step` is the next one, the one in hand, or the stored one."""
        if step in (self.done + 1, *(s.number for s in (self._running, self._stored) if s)):
            return
        raise OutOfRangeError(
            f"step {step} is out of order: {self.done} steps are done, the next one is {self.done + 1}",
            reason="STEP_OUT_OF_ORDER",
            metadata={"step": str(step), "expected": str(self.done + 1)},
        )

    async def train(
        self, samples: StepSamples, optimise: Callable[[StepSamples], Awaitable[Metrics]]
    ) -> tuple[Metrics, bool]:
        """Returns the step's metrics, and whether they are those of an earlier call.

        Raises OutOfRangeError as `check`, AlreadyExistsError if the step was sent before with other samples, and
        whatever `optimise` raises.
        """
        self.check(samples.step)
        known = next((s for s in (self._running, self._stored) if s and s.number == samples.step), None)
        if known is not None and known.digest != samples.digest:
            raise AlreadyExistsError(
                f"step {samples.step} was sent before with other samples; a step cannot be changed",
                reason="STEP_CONFLICT",
                metadata={"step": str(samples.step)},
            )
        if known is None:
            task = asyncio.ensure_future(self._run(samples, optimise))
            task.add_done_callback(_observe)
            self._running = _Step(samples.step, samples.digest, task)
        step = known or self._running
        assert step is not None
        return await asyncio.shield(step.result), known is not None

    async def _run(self, samples: StepSamples, optimise: Callable[[StepSamples], Awaitable[Metrics]]) -> Metrics:
        try:
            metrics = await optimise(samples)
            self._stored = self._running
            self.done = samples.step
        finally:
            self._running = None
        return metrics


def _observe(task: asyncio.Task[Metrics]) -> None:
    if not task.cancelled():
        task.exception()  # its callers may have left; the failure is the session's to report
