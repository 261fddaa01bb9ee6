"""RewardService and EnvironmentService over the environments of a registry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.duration_pb2 import Duration

from surogate.errors import InvalidInputError, SurogateError, UnimplementedError, Violation
from surogate.reward import metrics
from surogate.reward.base import AnyEnvironment, Split
from surogate.reward.episode import answer_message, episode_of
from surogate.reward.outcome import Plain
from surogate.reward.registry import Registry
from surogate.reward.scoring import ScoringPool
from surogate.rpc.status import to_status
from surogate.structs import from_struct
from surogate.v1 import reward_pb2, reward_pb2_grpc

ItemT = TypeVar("ItemT")
Context = grpc.aio.ServicerContext[Any, Any]

_CHUNK = 256  # examples made in one go, off the event loop
_SPLITS = {
    reward_pb2.ListExamplesRequest.SPLIT_TRAIN: Split.TRAIN,
    reward_pb2.ListExamplesRequest.SPLIT_EVAL: Split.EVAL,
}
_LONGEST = 86_400.0
"""Seconds that a rollout or a turn may take, whatever a request says."""


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """Scores groups of rollouts in a ScoringPool."""

    def __init__(self, registry: Registry, pool: ScoringPool, *, item_timeout: float, max_group: int) -> None:
        self._registry = registry
        self._pool = pool
        self._item_timeout = item_timeout
        self._max_group = max_group

    async def ListEnvironments(  # noqa: N802
        self, request: reward_pb2.ListEnvironmentsRequest, context: Context
    ) -> reward_pb2.ListEnvironmentsResponse:
        """Lists the environments; those of packages are imported for it, off the event loop."""
        listed = await asyncio.to_thread(lambda: [item.describe() for item in self._registry.usable()])
        return reward_pb2.ListEnvironmentsResponse(environments=listed)

    async def ScoreRollouts(  # noqa: N802
        self, request: reward_pb2.ScoreRolloutsRequest, context: Context
    ) -> reward_pb2.ScoreRolloutsResponse:
        """Scores one group. Raises InvalidInputError for bad arguments; an item's own failure is in its result."""
        environment = await _environment(self._registry, request.environment)
        args = environment.parse(from_struct(request.args))
        if not 1 <= len(request.rollouts) <= self._max_group:
            raise InvalidInputError(f"a group has 1 to {self._max_group} rollouts, not {len(request.rollouts)}")
        given = request.item_timeout if request.HasField("item_timeout") else None
        timeout = _seconds(given, "item_timeout", self._item_timeout)
        series = metrics.of_environment(environment.id)
        with metrics.GROUPS_IN_FLIGHT.track_inprogress(), series.seconds.time():
            outcomes = await self._pool.score(environment, args, request.example, request.rollouts, timeout)
        failed = sum(isinstance(outcome, SurogateError) for outcome in outcomes)
        series.scored.inc(len(outcomes) - failed)
        series.failed.inc(failed)
        return _response(request.rollouts, outcomes)


class EnvironmentServicer(reward_pb2_grpc.EnvironmentServiceServicer):
    """Streams the examples of the environments, and has them answer the turns of episodes."""

    def __init__(self, registry: Registry, pool: ScoringPool, *, turn_timeout: float) -> None:
        self._registry = registry
        self._pool = pool
        self._turn_timeout = turn_timeout

    async def ListExamples(  # noqa: N802
        self, request: reward_pb2.ListExamplesRequest, context: Context
    ) -> AsyncIterator[reward_pb2.Example]:
        """Streams the examples of a split. Raises InvalidInputError for bad arguments or an unknown split."""
        environment = await _environment(self._registry, request.environment)
        args = environment.parse(from_struct(request.args))
        split = _SPLITS.get(request.split)
        if split is None:
            raise InvalidInputError("split must be SPLIT_TRAIN or SPLIT_EVAL")
        if request.max_examples < 0:
            raise InvalidInputError("max_examples must be 0 (all) or above")
        found = await asyncio.to_thread(environment.examples, args, split, request.seed)
        examples = islice(found, request.max_examples or None)
        async for example in _off_loop(examples):
            yield example

    async def TakeTurn(  # noqa: N802
        self, request: reward_pb2.TakeTurnRequest, context: Context
    ) -> reward_pb2.TakeTurnResponse:
        """Has an environment answer a turn of the model. Raises UnimplementedError for one of single turns."""
        environment = await _environment(self._registry, request.environment)
        if not environment.multi_turn:
            raise UnimplementedError(f"environment {environment.id} answers no turns: its rollouts are single ones")
        args = environment.parse(from_struct(request.args))
        episode = episode_of(request)
        given = request.timeout if request.HasField("timeout") else None
        timeout = _seconds(given, "timeout", self._turn_timeout)
        return answer_message(await self._pool.turn(environment, args, request.example, episode, timeout), episode)


async def _environment(registry: Registry, environment_id: str) -> AnyEnvironment:
    """The environment; that of a package is imported off the event loop."""
    found = registry.loaded(environment_id)
    return found if found is not None else await asyncio.to_thread(registry.get, environment_id)


def _seconds(given: Duration | None, field: str, default: float) -> float:
    """A time of the request, else the default. Raises InvalidInputError unless it is above 0."""
    seconds = default if given is None else given.seconds + given.nanos / 1e9
    if seconds <= 0:
        why = f"must be above 0, not {seconds:g} s"
        raise InvalidInputError(f"{field} {why}", violations=[Violation(field, why)])
    return min(seconds, _LONGEST)


async def _off_loop(items: Iterator[ItemT]) -> AsyncIterator[ItemT]:
    """Yields what an iterator makes, which is advanced in a thread: making it may take a while."""
    while chunk := await asyncio.to_thread(lambda: list(islice(items, _CHUNK))):
        for item in chunk:
            yield item


def _response(rollouts: Sequence[reward_pb2.Rollout], outcomes: Sequence[Plain]) -> reward_pb2.ScoreRolloutsResponse:
    response = reward_pb2.ScoreRolloutsResponse()
    # Results are filled in where they stand: made apart and then copied in, they took four times as long.
    add = response.results.add
    for rollout, outcome in zip(rollouts, outcomes, strict=True):
        result = add()
        result.rollout_id = rollout.rollout_id
        if isinstance(outcome, float):
            result.score.reward = outcome
        elif isinstance(outcome, SurogateError):
            result.error.CopyFrom(to_status(outcome))
        else:
            result.score.CopyFrom(outcome)
    return response
