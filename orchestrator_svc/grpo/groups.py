"""What flows through a step: a prompt, its draw, the group of rollouts that it became, and how a draw can end."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from google.protobuf.struct_pb2 import Struct
from numpy.typing import NDArray

from surogate.v1 import common_pb2, reward_pb2

LENGTH = common_pb2.FINISH_REASON_LENGTH
ASSISTANT = "assistant"
"""Role of the model's turns."""


class Cause(StrEnum):
    """Why a drawn prompt was not trained on."""

    ZERO_SIGNAL = "zero_signal"
    """All rewards of the group were equal."""
    STALE = "stale"
    """Its oldest token came from a policy more than max_off_policy_steps behind."""
    REWARD = "reward"
    """Fewer than two of its rollouts could be scored."""
    GENERATION = "generation"
    """Fewer than two of its rollouts were generated."""
    ENVIRONMENT = "environment"
    """Fewer than two of its episodes were played to their end, since the environment did not answer."""
    JUDGE = "judge"
    """The judge, whose score is the reward, gave none."""
    FILTERED = "filtered"
    """Filters left fewer rollouts of it than a group needs."""
    SURPLUS = "surplus"
    """The step was full before it was ready (oversampling_factor above 1)."""
    CANCELLED = "cancelled"
    """The job was cancelled."""
    FAILED = "failed"
    """The job failed."""


@dataclass(frozen=True)
class Prompt:
    """An example, rendered and tokenized once."""

    environment: str
    """`env[].name`, or its id: the key of the environment in the job."""
    example: reward_pb2.Example
    token_ids: list[int]

    @property
    def key(self) -> str:
        """Names the prompt in the ledger."""
        return f"{self.environment}/{self.example.id}"


@dataclass(frozen=True)
class Draw:
    """A prompt drawn for a step. `ordinal` counts all draws of the job, from 0; `deck` and `position` tell where the
    prompt lay."""

    ordinal: int
    step: int
    prompt: Prompt
    deck: str = ""
    position: int = 0

    @property
    def group_id(self) -> str:
        """Id of the group, unique in the job; sorts like the ordinal."""
        return f"{self.ordinal:09d}"


@dataclass(slots=True)
class Rollout:
    """One completion, or one episode of several turns, and what it earned. Per-token arrays have its length T."""

    rollout_id: str
    token_ids: NDArray[np.int32]
    """What follows the prompt: of an episode the model's turns and, between them, the environment's answers."""
    logprobs: NDArray[np.float32]
    """The sampler's; 0 for tokens of the environment."""
    finish_reason: common_pb2.FinishReason.ValueType
    spans: list[common_pb2.PolicySpan]
    """Policy versions that made the model's tokens, in order."""
    reward: float = float("nan")
    """NaN until it is scored."""
    components: dict[str, float] = field(default_factory=dict)
    text: str = ""
    """The completion; of an episode the model's last turn."""
    answered: NDArray[np.bool_] | None = None
    """Which tokens are the environment's; None if there are none."""
    messages: list[common_pb2.ChatMessage] = field(default_factory=list)
    """What was said after the prompt, of an episode."""
    state: Struct = field(default_factory=Struct)
    """What the environment remembers, of an episode."""

    @property
    def sampled(self) -> NDArray[np.bool_]:
        """Which tokens the model made, of shape (T,): those that are trained on."""
        return np.ones(len(self.token_ids), np.bool_) if self.answered is None else ~self.answered

    @property
    def num_sampled(self) -> int:
        """Tokens that the model made."""
        return len(self.token_ids) if self.answered is None else int((~self.answered).sum())

    @property
    def turns(self) -> int:
        """Turns of the model."""
        return sum(message.role == ASSISTANT for message in self.messages) or 1

    @property
    def transcript(self) -> str:
        """What was said after the prompt, for people."""
        if self.turns == 1:
            return self.text
        return "\n".join(f"[{message.role}] {message.content}" for message in self.messages)

    @property
    def oldest_version(self) -> int:
        """Version of the policy that made its oldest token."""
        return min(span.policy_version for span in self.spans)

    @property
    def truncated(self) -> bool:
        """Whether it ended at the length limit."""
        return self.finish_reason == LENGTH


@dataclass
class Group:
    """The rollouts of one draw."""

    draw: Draw
    rollouts: list[Rollout]
    temperature: float
    scored_by: str = ""
    """The reward service that gave the rewards."""

    @property
    def rewards(self) -> NDArray[np.float64]:
        """Rewards, of shape (G,)."""
        return np.array([rollout.reward for rollout in self.rollouts], np.float64)

    @property
    def lengths(self) -> NDArray[np.float64]:
        """Completion lengths in tokens of the model, of shape (G,)."""
        return np.array([rollout.num_sampled for rollout in self.rollouts], np.float64)

    @property
    def oldest_version(self) -> int:
        """Version of the policy that made its oldest token."""
        return min(rollout.oldest_version for rollout in self.rollouts)

    @property
    def newest_version(self) -> int:
        """Version of the policy that made its newest token."""
        return max(span.policy_version for rollout in self.rollouts for span in rollout.spans)


@dataclass(frozen=True)
class Dropped:
    """A draw that will not be trained on."""

    draw: Draw
    cause: Cause
    detail: str = ""
    """For people: what went wrong."""
    group: Group | None = None
    """Its rollouts, where they are good for statistics at least."""
