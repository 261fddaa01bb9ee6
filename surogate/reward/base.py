"""What an environment is: a way to score completions and, perhaps, a source of prompts."""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Generic, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from surogate.errors import SurogateError, UnimplementedError
from surogate.reward.arguments import parse_arguments
from surogate.reward.episode import Answer, Episode
from surogate.v1 import common_pb2, reward_pb2


class Split(Enum):
    """Which part of the data: no prompt is ever in both."""

    TRAIN = "train"
    EVAL = "eval"


class EnvironmentArgs(BaseModel):
    """Arguments that all environments share: `env[].args` in orch.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_examples: int | None = Field(None, ge=1, le=10_000_000)
    """Number of training prompts. Unset: 1000 generated ones, or all that a dataset has."""
    eval_examples: int = Field(100, ge=1, le=1_000_000)
    """Number of held-out prompts. No held-out prompt is ever among the training prompts, whatever the seeds."""
    system_prompt: str | None = None
    """System message that goes before each prompt; none if unset."""

    def messages(self, prompt: str) -> list[common_pb2.ChatMessage]:
        """The prompt as a conversation, the system message first if there is one."""
        system = [common_pb2.ChatMessage(role="system", content=self.system_prompt)] if self.system_prompt else []
        return [*system, common_pb2.ChatMessage(role="user", content=prompt)]

    def generated(self, split: Split) -> int:
        """Number of examples to generate for a split."""
        return self.num_examples or 1000 if split is Split.TRAIN else self.eval_examples


ArgsT = TypeVar("ArgsT", bound=EnvironmentArgs)

Scored: TypeAlias = "reward_pb2.Score | float"
"""A reward alone, or with components and an explanation."""
GroupScored: TypeAlias = "Sequence[reward_pb2.Score | float | SurogateError]"
"""One entry a rollout, in order; an error for one that could not be scored."""


class Environment(ABC, Generic[ArgsT]):
    """One environment. Everything that a score depends on comes with the call.

    A subclass sets `id`, `description` and `args_model` and has `score`, or `score_group` where rewards are relative
    within a group. With `examples` it supplies prompts too. With `turn` it answers the model, turn after turn, before
    the episode is scored. All of these but `examples` may be `async`.
    """

    id: str
    """Name in `env[].id`."""
    description: str
    """What it rewards, in a sentence."""
    version: str = "1"
    """Changes when the same rollout would earn another reward than before."""
    args_model: type[ArgsT]
    """Schema of `env[].args`."""
    min_reward: float | None = 0.0
    """Smallest reward; None if unbounded."""
    max_reward: float | None = 1.0
    """Largest reward; None if unbounded."""
    deterministic: bool = True
    """Whether the same rollout always earns the same reward."""
    max_concurrent: int = 256
    """Rollouts (groups, with `score_group`) that an async scorer is given at once, and turns that an async `turn` is;
    the time of others has not begun."""

    def parse(self, args: Mapping[str, Any]) -> ArgsT:
        """Validates `env[].args`. Raises InvalidInputError whose violations name `env[].args.<key>`."""
        return parse_arguments(self.args_model, args)

    def examples(self, args: ArgsT, split: Split, seed: int) -> Iterator[reward_pb2.Example]:
        """Yields the examples of a split, in an order that depends on `args` and `seed` alone.

        Raises UnimplementedError, before the first, if the environment only scores: prompts then come from a dataset.
        """
        raise UnimplementedError(f"environment {self.id} only scores; it has no prompts")

    def score(
        self, args: ArgsT, example: reward_pb2.Example, rollout: reward_pb2.Rollout
    ) -> Scored | Awaitable[Scored]:
        """Scores one completion. Raises an exception if it cannot be scored: failure is never a reward of 0."""
        raise NotImplementedError

    def score_group(
        self, args: ArgsT, example: reward_pb2.Example, rollouts: Sequence[reward_pb2.Rollout]
    ) -> GroupScored | Awaitable[GroupScored]:
        """Scores all completions of a prompt at once, in order. The time for one rollout is the time for all."""
        raise NotImplementedError

    def turn(self, args: ArgsT, example: reward_pb2.Example, episode: Episode) -> Answer | Awaitable[Answer]:
        """Answers the model's turn, or returns None to end the episode.

        What it needs to remember goes into `episode.state`: it may be called again for the same turn, and in another
        process than for the turn before. Raises an exception if there is no answer: the rollout is then left out.
        """
        raise NotImplementedError

    def open(self) -> None:
        """Gets ready to score. The service calls it once, before it takes calls or when it first uses a package's."""

    def close(self) -> None:
        """Frees what scoring opened (processes, connections). The service calls it as it ends."""

    @property
    def scores_groups(self) -> bool:
        """Whether it scores all rollouts of a group at once."""
        return type(self).score_group is not Environment.score_group

    @property
    def is_async(self) -> bool:
        """Whether its scoring is an `async def`."""
        return inspect.iscoroutinefunction(self.score_group if self.scores_groups else self.score)

    @property
    def multi_turn(self) -> bool:
        """Whether it answers the model's turns."""
        return type(self).turn is not Environment.turn

    @property
    def has_examples(self) -> bool:
        """Whether it supplies prompts."""
        return type(self).examples is not Environment.examples

    def describe(self) -> reward_pb2.Environment:
        """The entry of ListEnvironments."""
        return reward_pb2.Environment(
            id=self.id,
            description=self.description,
            min_reward=self.min_reward,
            max_reward=self.max_reward,
            deterministic=self.deterministic,
            has_examples=self.has_examples,
            version=self.version,
            multi_turn=self.multi_turn,
        )


AnyEnvironment = Environment[Any]
