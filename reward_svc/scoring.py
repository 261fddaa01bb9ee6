"""Scores a group with a deadline for each item, so that an item that hangs costs only itself.

A group is scored by one thread, item after item. When an item is late, its thread is abandoned (Python cannot stop it),
the item is answered with a DeadlineError, and another thread goes on with the next item. Abandoned threads are daemons:
they never delay the end of the process. Their number is bounded: with `max_abandoned` of them alive nothing new is
scored (UnavailableError), `on_exhausted` is called, and the process is to be replaced.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence

from surogate.errors import DeadlineError, InternalError, SurogateError, UnavailableError
from surogate.telemetry.log import get_logger
from surogate.v1 import reward_pb2

ScoreFunction = Callable[[reward_pb2.Rollout], reward_pb2.Score]
Outcome = reward_pb2.Score | SurogateError

_log = get_logger("reward")


class ScoringPool:
    """Runs scorings in threads: at most `max_workers` groups at a time, further ones wait."""

    def __init__(
        self, *, max_workers: int = 8, max_abandoned: int = 16, on_exhausted: Callable[[], None] | None = None
    ) -> None:
        self._slots = asyncio.Semaphore(max_workers)
        self._max_abandoned = max_abandoned
        self._on_exhausted = on_exhausted
        self._abandoned: set[_Run] = set()

    @property
    def abandoned(self) -> int:
        """Threads that hang in an item that was given up."""
        self._abandoned = {run for run in self._abandoned if run.thread.is_alive()}
        return len(self._abandoned)

    async def score(
        self, score: ScoreFunction, rollouts: Sequence[reward_pb2.Rollout], item_timeout: float
    ) -> list[Outcome]:
        """Scores `rollouts` in order; each item has `item_timeout` seconds from the moment that it starts.

        Raises UnavailableError when too many threads hang. What goes wrong with one item is in its outcome.
        """
        outcomes: list[Outcome] = []
        async with self._slots:
            while len(outcomes) < len(rollouts):
                outcomes += await self._run(score, rollouts[len(outcomes) :], item_timeout)
        return outcomes

    async def _run(
        self, score: ScoreFunction, rollouts: Sequence[reward_pb2.Rollout], item_timeout: float
    ) -> list[Outcome]:
        if self.abandoned >= self._max_abandoned:
            raise UnavailableError(f"{self._max_abandoned} scorings hang; this reward service must be restarted")
        run = _Run(score, rollouts)
        try:
            while not await run.wait(run.seconds_left(item_timeout)):
                late = run.abandon_if_late(item_timeout)
                if late is not None:
                    self._give_up(run)
                    return [*late, DeadlineError(f"scoring took longer than item_timeout ({item_timeout:g} s)")]
        except asyncio.CancelledError:
            run.abandon()
            self._give_up(run)
            raise
        return run.outcomes

    def _give_up(self, run: _Run) -> None:
        self._abandoned.add(run)
        if self.abandoned >= self._max_abandoned and self._on_exhausted is not None:
            _log.error("too many scorings hang; no longer serving", abandoned=self._max_abandoned)
            self._on_exhausted()


class _Run:
    """One thread that scores items until it is done or abandoned."""

    def __init__(self, score: ScoreFunction, rollouts: Sequence[reward_pb2.Rollout]) -> None:
        self._score = score
        self._rollouts = rollouts
        self._lock = threading.Lock()
        self._outcomes: list[Outcome] = []
        self._item_started = time.monotonic()
        self._is_abandoned = False
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Event()
        self.thread = threading.Thread(target=self._main, name="scoring", daemon=True)
        self.thread.start()

    @property
    def outcomes(self) -> list[Outcome]:
        """Outcomes so far, in order."""
        with self._lock:
            return list(self._outcomes)

    async def wait(self, seconds: float) -> bool:
        """Waits for the thread to end; returns whether it did."""
        try:
            async with asyncio.timeout(max(seconds, 0.001)):
                await self._done.wait()
        except TimeoutError:
            return False
        return True

    def seconds_left(self, item_timeout: float) -> float:
        """Seconds until the current item is late."""
        with self._lock:
            return self._item_started + item_timeout - time.monotonic()

    def abandon(self) -> None:
        """Tells the thread to stop after its current item."""
        with self._lock:
            self._is_abandoned = True

    def abandon_if_late(self, item_timeout: float) -> list[Outcome] | None:
        """Abandons the thread if its current item is late; returns the outcomes before that item, else None."""
        with self._lock:
            finished = len(self._outcomes) == len(self._rollouts)
            if finished or time.monotonic() - self._item_started < item_timeout:
                return None
            self._is_abandoned = True
            return list(self._outcomes)

    def _main(self) -> None:
        for rollout in self._rollouts:
            outcome = _score_one(self._score, rollout)
            with self._lock:
                if self._is_abandoned:
                    return
                self._outcomes.append(outcome)
                self._item_started = time.monotonic()
        try:
            self._loop.call_soon_threadsafe(self._done.set)
        except RuntimeError:
            _log.debug("the service stopped while a group was scored")


def _score_one(score: ScoreFunction, rollout: reward_pb2.Rollout) -> Outcome:
    try:
        result = score(rollout)
    except SurogateError as error:
        return error
    # A scorer is somebody's code: whatever it raises is this item's error and nobody else's.
    except Exception as error:  # noqa: BLE001
        _log.warning("scoring failed", rollout=rollout.rollout_id, exc_info=True)
        return InternalError(f"scoring failed: {type(error).__name__}: {error}")
    if not math.isfinite(result.reward):
        return InternalError(f"scoring gave {result.reward}, which is not a finite number")
    return result
