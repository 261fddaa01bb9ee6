"""What an environment is: a source of prompts and a way to score completions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from reward_svc.environments.arguments import parse_arguments
from surogate.v1 import common_pb2, reward_pb2


class Split(Enum):
    """Which part of the data: no prompt is ever in both."""

    TRAIN = "train"
    EVAL = "eval"


class EnvironmentArgs(BaseModel):
    """Arguments that all built-in environments share: `env[].args` in orch.yaml."""

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


class Environment(ABC, Generic[ArgsT]):
    """One environment. Instances hold no state: everything comes with the call."""

    id: ClassVar[str]
    """Name in `env[].id`."""
    description: ClassVar[str]
    """What it rewards, in a sentence."""
    version: ClassVar[str] = "1"
    """Changes when the same rollout would earn another reward than before."""
    args_model: type[ArgsT]
    """Schema of `env[].args`."""

    def parse(self, args: Mapping[str, Any]) -> ArgsT:
        """Validates `env[].args`. Raises InvalidInputError whose violations name `env[].args.<key>`."""
        return parse_arguments(self.args_model, args)

    @abstractmethod
    def examples(self, args: ArgsT, split: Split, seed: int) -> Iterator[reward_pb2.Example]:
        """Yields the examples of a split, in an order that depends on `args` and `seed` alone."""

    @abstractmethod
    def score(self, args: ArgsT, example: reward_pb2.Example, rollout: reward_pb2.Rollout) -> reward_pb2.Score:
        """Scores one completion, from 0 to 1. Raises a SurogateError if it cannot be scored."""

    def describe(self) -> reward_pb2.Environment:
        """The entry of ListEnvironments."""
        return reward_pb2.Environment(
            id=self.id,
            description=self.description,
            min_reward=0.0,
            max_reward=1.0,
            deterministic=True,
            has_examples=True,
            version=self.version,
        )
