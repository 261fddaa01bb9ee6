"""Scores a group with a deadline for each item, so that an item that hangs costs only itself.

An ordinary scorer runs in a thread, item after item. When an item is late, its thread is abandoned (Python cannot stop
it), the item is answered with a DeadlineError, and another thread goes on with the next item. Abandoned threads are
daemons: they never delay the end of the process. An async scorer runs on the lane, all items of a group at once; a late
one is cancelled. What is abandoned and still runs is counted: with `max_abandoned` of them alive nothing new is scored
(UnavailableError), `on_exhausted` is called, and the process is to be replaced.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from surogate.errors import DeadlineError, InternalError, SurogateError, UnavailableError
from surogate.reward import metrics
from surogate.reward.base import AnyEnvironment
from surogate.reward.composite import Composite
from surogate.reward.episode import Episode
from surogate.reward.lane import AsyncCall, Lane
from surogate.reward.outcome import Plain, group_outcomes, outcome_of, score_of
from surogate.reward.threads import Call, Run, Threads
from surogate.telemetry.log import get_logger
from surogate.v1 import reward_pb2

_log = get_logger("reward")


class ScoringPool:
    """Runs scorings: in threads at most `max_workers` groups at a time, further ones wait."""

    def __init__(
        self, *, max_workers: int = 8, max_abandoned: int = 16, on_exhausted: Callable[[], None] | None = None
    ) -> None:
        self._slots = asyncio.Semaphore(max_workers)
        self._max_abandoned = max_abandoned
        self._on_exhausted = on_exhausted
        self._abandoned: set[Run | AsyncCall] = set()
        self._lane = Lane()
        self._threads = Threads()
        self._room: dict[str, asyncio.Semaphore] = {}
        metrics.HUNG.set_function(lambda: self.abandoned)

    @property
    def abandoned(self) -> int:
        """Scorers that hang in an item that was given up."""
        self._abandoned = {run for run in self._abandoned if run.alive}
        return len(self._abandoned)

    def close(self) -> None:
        """Cancels async scorers, and ends the threads of the others."""
        self._lane.close()
        self._threads.close()

    async def score(
        self,
        environment: AnyEnvironment,
        args: Any,
        example: reward_pb2.Example,
        rollouts: Sequence[reward_pb2.Rollout],
        item_timeout: float,
    ) -> list[Plain]:
        """Scores `rollouts` in order; each item has `item_timeout` seconds from the moment that it starts.

        An environment that scores groups has that time for the group. Raises UnavailableError when too many scorers
        hang. What goes wrong with one item is in its outcome.
        """
        if isinstance(environment, Composite):
            scored = [
                self.score(part.environment, part.args, example, rollouts, item_timeout)
                for part in environment.parts(args)
            ]
            by_part = await asyncio.gather(*scored)
            return [environment.combine(args, list(map(score_of, found))) for found in zip(*by_part, strict=True)]
        run = self._awaited if environment.is_async else self._threaded
        if environment.scores_groups:
            call = functools.partial(environment.score_group, args, example, list(rollouts))
            (found,) = await run(environment, [call], item_timeout)
            return group_outcomes(found, len(rollouts))
        calls = [functools.partial(environment.score, args, example, rollout) for rollout in rollouts]
        return [outcome_of(value) for value in await run(environment, calls, item_timeout)]

    async def turn(
        self, environment: AnyEnvironment, args: Any, example: reward_pb2.Example, episode: Episode, timeout: float
    ) -> object:
        """The environment's answer to a turn of the model, within `timeout` seconds.

        Raises DeadlineError when it takes longer, UnavailableError when too many scorers hang, the environment's own
        SurogateError, and InternalError for whatever else it raises.
        """
        run = self._awaited if inspect.iscoroutinefunction(environment.turn) else self._threaded
        (answer,) = await run(environment, [functools.partial(environment.turn, args, example, episode)], timeout)
        match answer:
            case DeadlineError():
                raise DeadlineError(f"answering a turn took longer than its timeout ({timeout:g} s)")
            case SurogateError():
                raise answer
            case Exception():
                _log.warning("answering a turn failed", environment=environment.id, exc_info=answer)
                raise InternalError(f"answering a turn failed: {type(answer).__name__}: {answer}")
        return answer

    async def _threaded(self, environment: AnyEnvironment, calls: Sequence[Call], item_timeout: float) -> list[object]:
        results: list[object] = []
        async with self._slots:
            while len(results) < len(calls):
                results += await self._run(calls[len(results) :], item_timeout)
        return results

    async def _awaited(self, environment: AnyEnvironment, calls: Sequence[Call], item_timeout: float) -> list[object]:
        self._refuse_if_exhausted()
        room = self._room.setdefault(environment.id, asyncio.Semaphore(environment.max_concurrent))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._await(room, call, item_timeout)) for call in calls]
        return [task.result() for task in tasks]

    async def _await(self, room: asyncio.Semaphore, make: Call, item_timeout: float) -> object:
        async with room:
            call = self._lane.call(make)
            try:
                return await call.result(item_timeout)
            except DeadlineError as error:
                if call.alive and not await call.settled():
                    self._give_up(call)
                return error
            except Exception as error:  # noqa: BLE001 - the scorer's; `outcome_of` names it
                return error

    async def _run(self, calls: Sequence[Call], item_timeout: float) -> list[object]:
        self._refuse_if_exhausted()
        run = self._threads.start(calls)
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
        return run.results

    def _refuse_if_exhausted(self) -> None:
        if self._abandoned and self.abandoned >= self._max_abandoned:
            raise UnavailableError(f"{self._max_abandoned} scorings hang; this reward service must be restarted")

    def _give_up(self, run: Run | AsyncCall) -> None:
        self._abandoned.add(run)
        if self.abandoned >= self._max_abandoned and self._on_exhausted is not None:
            _log.error("too many scorings hang; no longer serving", abandoned=self._max_abandoned)
            self._on_exhausted()
