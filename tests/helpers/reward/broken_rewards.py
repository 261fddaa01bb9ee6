"""Reward services that each do one thing wrong, as their authors might; `GoodReward` does nothing wrong."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from surogate.v1 import reward_pb2, reward_pb2_grpc

Asked = reward_pb2.ScoreRolloutsRequest
Answered = reward_pb2.ScoreRolloutsResponse


class GoodReward(reward_pb2_grpc.RewardServiceServicer):
    """Rewards the share of vowels; keeps to the contract."""

    deterministic = True
    environment = "vowels"
    server: grpc.aio.Server
    """What serves it."""

    def describe(self) -> reward_pb2.Environment:
        """The entry of ListEnvironments."""
        return reward_pb2.Environment(
            id=self.environment,
            description="Share of vowels.",
            min_reward=0,
            max_reward=1,
            deterministic=self.deterministic,
            version="1",
        )

    async def ListEnvironments(self, request: Any, context: Any) -> reward_pb2.ListEnvironmentsResponse:
        return reward_pb2.ListEnvironmentsResponse(environments=[self.describe()])

    async def ScoreRollouts(self, request: Asked, context: Any) -> Answered:
        if request.environment != self.environment or len(request.args):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such environment, or no such argument")
        return Answered(results=[await self.result(rollout) for rollout in request.rollouts])

    async def result(self, rollout: reward_pb2.Rollout) -> reward_pb2.RolloutResult:
        """The result for one rollout."""
        result = reward_pb2.RolloutResult(rollout_id=rollout.rollout_id)
        result.score.reward = self.reward(rollout.completion)
        return result

    def reward(self, text: str) -> float:
        """Share of vowels."""
        return sum(char in "aeiou" for char in text) / max(1, len(text))


class OneShort(GoodReward):
    """Leaves out the last rollout."""

    async def ScoreRollouts(self, request: Asked, context: Any) -> Answered:
        answer = await super().ScoreRollouts(request, context)
        del answer.results[-1]
        return answer


class Sorted(GoodReward):
    """Answers the best first."""

    async def ScoreRollouts(self, request: Asked, context: Any) -> Answered:
        answer = await super().ScoreRollouts(request, context)
        return Answered(results=sorted(answer.results, key=lambda result: result.score.reward, reverse=True))


class OwnIds(GoodReward):
    """Numbers its results itself."""

    async def ScoreRollouts(self, request: Asked, context: Any) -> Answered:
        answer = await super().ScoreRollouts(request, context)
        for number, result in enumerate(answer.results):
            result.rollout_id = str(number)
        return answer


class Twice(GoodReward):
    """Answers twice about the first rollout, and not about the last."""

    async def ScoreRollouts(self, request: Asked, context: Any) -> Answered:
        answer = await super().ScoreRollouts(request, context)
        answer.results[-1].CopyFrom(answer.results[0])
        return answer


class ByPosition(GoodReward):
    """Gives every result the reward of the rollout before it."""

    async def ScoreRollouts(self, request: Asked, context: Any) -> Answered:
        answer = await super().ScoreRollouts(request, context)
        rewards = [result.score.reward for result in answer.results]
        for result, reward in zip(answer.results, rewards[-1:] + rewards[:-1], strict=True):
            result.score.reward = reward
        return answer


class Silent(GoodReward):
    """Leaves out the outcome where the reward would be 0."""

    async def result(self, rollout: reward_pb2.Rollout) -> reward_pb2.RolloutResult:
        result = await super().result(rollout)
        return result if result.score.reward else reward_pb2.RolloutResult(rollout_id=rollout.rollout_id)


class NoCode(GoodReward):
    """Has errors without a code."""

    async def result(self, rollout: reward_pb2.Rollout) -> reward_pb2.RolloutResult:
        if rollout.completion.strip():
            return await super().result(rollout)
        result = reward_pb2.RolloutResult(rollout_id=rollout.rollout_id)
        result.error.message = "nothing to score"
        return result


class Nan(GoodReward):
    """Divides nothing by nothing."""

    def reward(self, text: str) -> float:
        return super().reward(text) if text.strip() else float("nan")


class Percent(GoodReward):
    """Says 0 to 1, and gives 0 to 100."""

    def reward(self, text: str) -> float:
        return 100 * super().reward(text)


class Noisy(GoodReward):
    """Promises equal rewards, and adds noise."""

    def reward(self, text: str) -> float:
        return random.random()


class HonestlyNoisy(Noisy):
    """Promises nothing."""

    deterministic = False


class FailsOnEmpty(GoodReward):
    """Does not expect an empty completion."""

    def reward(self, text: str) -> float:
        return super().reward(text[0] + text)


class FailsOnUnicode(GoodReward):
    """Expects ASCII."""

    def reward(self, text: str) -> float:
        return super().reward(text.encode("ascii").decode())


class GroupFails(GoodReward):
    """An odd rollout makes errors of all."""

    async def ScoreRollouts(self, request: Asked, context: Any) -> Answered:
        answer = await super().ScoreRollouts(request, context)
        if any(len(rollout.completion) == 2000 for rollout in request.rollouts):
            for result in answer.results:
                result.error.code, result.error.message = 3, "cannot parse"
        return answer


class Ends(GoodReward):
    """Ends at an empty completion."""

    end: asyncio.Future[None]

    async def ScoreRollouts(self, request: Asked, context: Any) -> Answered:
        if not all(rollout.completion for rollout in request.rollouts):
            self.end = asyncio.ensure_future(self.server.stop(None))
            await asyncio.sleep(60)  # until the server cancels it
        return await super().ScoreRollouts(request, context)


class Slow(GoodReward):
    """Takes its time, whatever item_timeout says."""

    async def ScoreRollouts(self, request: Asked, context: Any) -> Answered:
        if request.item_timeout.ToNanoseconds() < 10**8:
            await asyncio.sleep(1.5)
        return await super().ScoreRollouts(request, context)


class Shared(GoodReward):
    """Keeps the call's rollouts in a field of its own."""

    async def ScoreRollouts(self, request: Asked, context: Any) -> Answered:
        self.rollouts = list(request.rollouts)
        await asyncio.sleep(0.1)
        ids = [rollout.rollout_id for rollout in request.rollouts]
        rewards = [self.reward(rollout.completion) for rollout in self.rollouts]
        results = [
            reward_pb2.RolloutResult(rollout_id=name, score=reward_pb2.Score(reward=reward))
            for name, reward in zip(ids, rewards, strict=False)
        ]
        return Answered(results=results)


class OneAtATime(GoodReward):
    """Scores one group after the other."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()

    async def ScoreRollouts(self, request: Asked, context: Any) -> Answered:
        async with self.lock:
            await asyncio.sleep(0.2)
            return await super().ScoreRollouts(request, context)


class LeaksLocks(GoodReward):
    """A cancelled call keeps its worker, and there are eight."""

    def __init__(self) -> None:
        self.free = asyncio.Semaphore(8)

    async def ScoreRollouts(self, request: Asked, context: Any) -> Answered:
        await self.free.acquire()
        await asyncio.sleep(0 if len(request.rollouts) < 16 else 1.0)
        self.free.release()
        return await super().ScoreRollouts(request, context)


class AnyEnvironment(GoodReward):
    """Does not look at the environment's id."""

    async def ScoreRollouts(self, request: Asked, context: Any) -> Answered:
        return Answered(results=[await self.result(rollout) for rollout in request.rollouts])


class Nameless(GoodReward):
    """Lists an environment without id."""

    environment = ""


class Upside(GoodReward):
    """Lists bounds the wrong way round."""

    def describe(self) -> reward_pb2.Environment:
        return reward_pb2.Environment(id=self.environment, min_reward=1, max_reward=0, deterministic=True)


class WithPrompts(GoodReward):
    """Has prompts of its own, in the service beside it."""

    def describe(self) -> reward_pb2.Environment:
        found = super().describe()
        found.has_examples = True
        return found


class ShuffledPrompts(reward_pb2_grpc.EnvironmentServiceServicer):
    """Prompts in an order that no seed decides."""

    async def ListExamples(self, request: Any, context: Any) -> AsyncIterator[reward_pb2.Example]:
        for number in random.sample(range(1000), 20):
            example = reward_pb2.Example(id=str(number), answer="a")
            example.prompt.add(role="user", content=f"{request.split} {number}")
            yield example


class WithTurns(GoodReward):
    """Says that it answers turns."""

    def describe(self) -> reward_pb2.Environment:
        found = super().describe()
        found.multi_turn = True
        return found


class ForgetfulTurns(reward_pb2_grpc.EnvironmentServiceServicer):
    """Counts turns in a field of its own."""

    turns = 0

    async def TakeTurn(self, request: Any, context: Any) -> reward_pb2.TakeTurnResponse:
        self.turns += 1
        answer = reward_pb2.TakeTurnResponse()
        answer.messages.add(role="user", content=f"That was turn {self.turns}.")
        return answer


@asynccontextmanager
async def serving(
    servicer: GoodReward, *others: Any, options: list[tuple[str, Any]] | None = None
) -> AsyncIterator[str]:
    """Serves it as its author would: with plain gRPC; yields the address."""
    server = servicer.server = grpc.aio.server(options=options or [("grpc.max_receive_message_length", 64 * 2**20)])
    reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
    for other in others:
        reward_pb2_grpc.add_EnvironmentServiceServicer_to_server(other, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
