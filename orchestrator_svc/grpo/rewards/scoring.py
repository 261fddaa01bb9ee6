"""Rewards of a group, and answers to turns: asking the environment's service."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct

from orchestrator_svc.grpo.fatal import REFUSALS
from orchestrator_svc.grpo.groups import Rollout
from orchestrator_svc.grpo.rewards.answers import take_rewards, words_of
from orchestrator_svc.grpo.rewards.breaker import FIRST_PAUSE, Breaker
from orchestrator_svc.grpo.rewards.services import RewardEndpoint
from orchestrator_svc.grpo.rewards.shadow import Shadow
from orchestrator_svc.grpo.stalls import Stalls
from surogate.errors import (
    BusyError,
    CancelledError,
    DeadlineError,
    FailedPreconditionError,
    SurogateError,
    UnavailableError,
)
from surogate.v1 import reward_pb2

GROUPS_AT_ONCE = 64
"""Groups that are scored at once, over all environments."""

TURNS_AT_ONCE = 256
"""Turns that environments answer at once, over all episodes."""

GRACE = 5.0
"""Seconds that a call may take beyond the time of its items."""

ResponseT = TypeVar("ResponseT")


@dataclass(frozen=True)
class Environment:
    """One environment of a job."""

    key: str
    """`env[].name`, or the id: unique in the job."""
    id: str
    args: Struct
    endpoint: RewardEndpoint
    timeout: float
    """Seconds that one rollout may take to score, or a turn to be answered."""
    max_turns: int = 0
    """Most turns of the model in an episode; 0 where rollouts are single completions."""


class Scored(NamedTuple):
    """What became of a group."""

    rollouts: list[Rollout]
    """Those that have a reward now."""
    problem: str
    """What went wrong with others."""
    scored_by: str
    """The service, as the ledger calls it."""


class Scorer:
    """Scores groups; a bounded number at once."""

    def __init__(
        self,
        environments: Mapping[str, Environment],
        *,
        job: str,
        patience: float,
        judge: Environment | None = None,
        stalls: Stalls | None = None,
    ) -> None:
        """`judge` scores beside the environments; `patience`: seconds for which a service that is away is asked."""
        self._stalls = stalls or Stalls()
        self._environments = dict(environments)
        self._configured = dict(environments)
        self._shadows: dict[str, Shadow] = {}
        self._breakers = {key: Breaker() for key in [*environments, *([judge.key] if judge else [])]}
        self._proven: set[str] = set()
        """Environments that have answered: what their service refuses from then on costs one group, not the job."""
        self._job = job
        self._patience = patience
        self._room = asyncio.Semaphore(GROUPS_AT_ONCE)
        self._turns = asyncio.Semaphore(TURNS_AT_ONCE)

    def environment(self, key: str) -> Environment:
        """An environment, with the service that it has now."""
        return self._environments[key]

    @property
    def multi_turn(self) -> list[str]:
        """Keys of the environments whose rollouts are episodes."""
        return sorted(key for key, environment in self._configured.items() if environment.max_turns)

    async def take_turn(self, spec: Environment, request: reward_pb2.TakeTurnRequest) -> reward_pb2.TakeTurnResponse:
        """Has the environment answer the model's turn; the rest of the request is filled in here.

        Raises:
            SurogateError: It did not.
        """
        request.run, request.environment = f"jobs/{self._job}", spec.id
        request.args.CopyFrom(spec.args)
        request.timeout.CopyFrom(_duration(spec.timeout))

        async def call(service: Environment) -> reward_pb2.TakeTurnResponse:
            stub = await service.endpoint.environment()
            return await stub.TakeTurn(request, timeout=spec.timeout + GRACE)

        async with self._turns:
            try:
                response, _ = await self._ask(spec, call)
                return response
            except SurogateError as error:
                raise self._named(spec, error, spec.timeout + GRACE) from error

    async def score(
        self, spec: Environment, example: reward_pb2.Example, group_id: str, rollouts: Sequence[Rollout]
    ) -> Scored:
        """Fills in `reward` and `components` of the rollouts.

        `spec` is asked; where it cannot be reached and was replaced meanwhile, what took its place.

        Raises:
            SurogateError: The group could not be scored at all.
        """
        request = reward_pb2.ScoreRolloutsRequest(
            run=f"jobs/{self._job}", group_id=group_id, environment=spec.id, args=spec.args, example=example
        )
        request.item_timeout.CopyFrom(_duration(spec.timeout))
        for rollout in rollouts:
            sent = request.rollouts.add(
                rollout_id=rollout.rollout_id,
                completion=rollout.text,
                num_tokens=rollout.num_sampled,
                finish_reason=rollout.finish_reason,
            )
            if rollout.messages:
                sent.messages.extend(rollout.messages)
                sent.state.CopyFrom(rollout.state)

        async def call(service: Environment) -> reward_pb2.ScoreRolloutsResponse:
            stub = await service.endpoint.reward()
            return await stub.ScoreRollouts(request, timeout=_time_for(spec))

        async with self._room:
            try:
                response, service = await self._ask(spec, call)
            except SurogateError as error:
                raise self._named(spec, error, _time_for(spec)) from error
        scored, problem = take_rewards(spec.id, rollouts, response)
        if spec.key in self._shadows:
            rewards = {rollout.rollout_id: rollout.reward for rollout in scored}
            self._shadows[spec.key].offer(request, rewards, _time_for(spec))
        return Scored(scored, problem, service.endpoint.name)

    def replace(self, environment: str, endpoint: RewardEndpoint | None) -> None:
        """Has another service score an environment from the next group on; None is the configured one again."""
        configured = self._configured[environment]
        self._environments[environment] = replace(configured, endpoint=endpoint) if endpoint else configured
        self._breakers[environment] = Breaker()

    async def shadow(self, environment: str, endpoint: RewardEndpoint | None) -> None:
        """Has a second service score an environment as well; None ends that."""
        before = self._shadows.pop(environment, None)
        if before is not None:
            await before.close()
        if endpoint is not None:
            self._shadows[environment] = Shadow(endpoint)

    async def close_shadows(self) -> None:
        """Ends all shadows."""
        for environment in list(self._shadows):
            await self.shadow(environment, None)

    def shadow_metrics(self) -> dict[str, float]:
        """`shadow/<environment>/<name>` since the last call; see `Shadow.drain`."""
        return {
            f"shadow/{key}/{name}": value
            for key, shadow in self._shadows.items()
            for name, value in shadow.drain().items()
        }

    async def _ask(
        self, spec: Environment, call: Callable[[Environment], Awaitable[ResponseT]]
    ) -> tuple[ResponseT, Environment]:
        """Calls a service, again and again while it cannot be reached or is full: its methods are safe to repeat.

        Returns the answer, and whose it is: one that is gone for good answers no more, whatever was begun with it.
        """
        give_up = time.monotonic() + self._patience
        service, breaker = spec, self._breakers[spec.key]
        while True:
            wait = 0.0
            async with breaker.attempt(give_up):
                try:
                    response = await call(service)
                except BusyError as error:
                    wait = max(error.retry_after, FIRST_PAUSE)  # whatever the service says: it is not to be flooded
                    if time.monotonic() + wait > give_up:
                        raise
                except (UnavailableError, CancelledError) as error:
                    breaker.failed()
                    if time.monotonic() > give_up:
                        raise
                    if breaker.is_open:
                        await self._stalls.begin(_who(service), words_of(error))
                else:
                    breaker.succeeded()
                    self._proven.add(spec.key)
                    await self._stalls.end(_who(service))
                    return response, service
            await asyncio.sleep(wait)
            replaced = self._environments.get(spec.key, service)
            if replaced.endpoint is not service.endpoint:
                await self._stalls.end(_who(service))
                service, breaker = replaced, self._breakers[spec.key]

    def _named(self, spec: Environment, error: SurogateError, seconds: float) -> SurogateError:
        """The failure of a call, telling whose it is; a refusal ends the job where the service never did otherwise."""
        what = words_of(error)
        if isinstance(error, DeadlineError):
            what = f"it did not answer within {seconds:g} s (timeout of a rollout: {spec.timeout:g} s)"
        named = copy.copy(error)
        if isinstance(error, REFUSALS) and spec.key in self._proven:
            named = FailedPreconditionError("", reason=error.reason, metadata=error.metadata)
        named.message = f"environment {spec.id}: the reward service failed: {what}"
        return named


def _who(service: Environment) -> str:
    where = "" if service.endpoint.name == "built-in" else f" at {service.endpoint.name}"
    return f"the reward service of {service.key}{where}"


def _time_for(spec: Environment) -> float:
    """Seconds for a scoring call. A service may score the items one after the other as well as at once; twice an item's
    time tells a hang."""
    return 2 * spec.timeout + GRACE


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
