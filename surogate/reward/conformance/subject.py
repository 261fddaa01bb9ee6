"""One environment of the service under check, asked as a job asks it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct

from surogate.reward.conformance.rules import RuleBook
from surogate.v1 import common_pb2, reward_pb2

RUN = "jobs/surogate-reward-check"
GRACE = 5.0
"""Seconds that a call may take beyond the time of two items, as a job's scoring calls may."""

Reward = float | None
"""None stands for an error."""


@dataclass(frozen=True)
class Answer:
    """What came back for a group."""

    rewards: list[Reward]
    """By rollout, in the order of the request, found by their ids."""
    errors: list[str]
    """Messages of the errors."""
    seconds: float

    @property
    def scored(self) -> list[bool]:
        """Which rollouts were scored."""
        return [reward is not None for reward in self.rewards]


class Subject:
    """One environment, its rules, and what to ask about."""

    def __init__(
        self,
        stub: Any,
        environment: reward_pb2.Environment,
        example: reward_pb2.Example,
        args: Struct,
        item_timeout: float,
        *,
        unfed: bool = False,
    ) -> None:
        self.environment = environment
        self.example = example
        self.args = args
        self.item_timeout = item_timeout
        """Seconds that one rollout may take."""
        self.unfed = unfed
        """Whether the environment has prompts for other arguments only: what it cannot score here tells nothing."""
        self.book = RuleBook(environment)
        self._stub = stub
        self._numbers = itertools.count(1)

    @property
    def call_timeout(self) -> float:
        """Seconds that a call may take."""
        return 2 * self.item_timeout + GRACE

    def request(self, completions: Sequence[str], *, item_timeout: float | None = None) -> Any:
        """A group of completions with ids that no other group has."""
        group = f"g{next(self._numbers)}"
        timeout = Duration()
        timeout.FromNanoseconds(int((item_timeout or self.item_timeout) * 1e9))
        asked = reward_pb2.ScoreRolloutsRequest(
            run=RUN,
            group_id=group,
            environment=self.environment.id,
            args=self.args,
            example=self.example,
            item_timeout=timeout,
        )
        for index, completion in enumerate(completions):
            asked.rollouts.add(
                rollout_id=f"{group}-{index}",
                completion=completion,
                num_tokens=max(1, len(completion) // 4),
                finish_reason=common_pb2.FINISH_REASON_STOP,
            )
        return asked

    def start(self, asked: reward_pb2.ScoreRolloutsRequest, *, timeout: float | None = None) -> Any:
        """The call, under way; its deadline is `call_timeout` unless given."""
        return self._stub.ScoreRollouts(asked, timeout=timeout or self.call_timeout)

    async def ask(self, completions: Sequence[str], call: str, *, item_timeout: float | None = None) -> Answer:
        """Has a group scored; broken rules go into the book with the name of the call. Raises SurogateError."""
        asked = self.request(completions, item_timeout=item_timeout)
        began = time.monotonic()
        response = await self.start(asked)
        seconds = time.monotonic() - began
        self.book.judge(asked, response, call)
        by_id = {result.rollout_id: result for result in response.results}
        results = [by_id.get(rollout.rollout_id) for rollout in asked.rollouts]
        errors = [item.error.message for item in results if item is not None and item.HasField("error")]
        return Answer([_reward(result) for result in results], errors, seconds)


def _reward(result: reward_pb2.RolloutResult | None) -> Reward:
    return result.score.reward if result is not None and result.HasField("score") else None
