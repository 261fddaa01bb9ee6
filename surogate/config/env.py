"""Environments of orch.yaml: prompts and rewards, for training and for evaluation."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from surogate.config.base import ConfigModel, Positive, Size, Text, fail, one_of, problem, refuse
from surogate.config.types import Address


def _arguments(value: Any) -> Any:
    wrong = _not_finite(value)
    if wrong:
        raise fail(f"must hold finite numbers, got {wrong}")
    return value


def _not_finite(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return next((wrong for item in value if (wrong := _not_finite(item))), "")
    return ""


class EnvConfig(ConfigModel):
    """An environment: where prompts and rewards come from."""

    block: ClassVar[str] = "env."

    id: Text
    """Environment: one of the reward service (`reverse-text`, `arithmetic`, `exact-match`), or what `address`
    serves.
    """
    name: Text | None = None
    """Name in metrics and logs. null = id."""
    args: Annotated[dict[str, Any], BeforeValidator(_arguments)] = Field({})
    """Arguments of the environment. `dataset`: a file of prompts, for a service that only scores."""
    address: Address | None = None
    """gRPC address `host:port` of another service that implements RewardService. null = the built-in one."""
    timeout: Positive = 60.0
    """Longest time to score one rollout, or to answer a turn of an episode, in seconds, > 0. What takes longer is an
    error, not a reward.
    """
    max_turns: Annotated[Size, Field(le=10_000)] | None = None
    """Most turns of the model in an episode, 1 to 10,000, for an environment that answers them. null = 16."""
    image: Text | None = None
    """Image of a reward service to run for this job, in a pod of its own (Kubernetes), where it serves gRPC on port
    50051. The orchestrator's `allowed_images` must match it. null = no service of the job's own.
    """
    tls: bool = False
    """Use TLS to `address`."""
    token_env: Text | None = None
    """Environment variable that holds the bearer token for `address`. null = none."""

    @property
    def label(self) -> str:
        """Name in metrics and logs."""
        return self.name or self.id

    @model_validator(mode="after")
    def _address_first(self) -> Self:
        given = [name for name in ("tls", "token_env") if getattr(self, name)]
        if self.address is None:
            refuse(
                "env", (problem(name, "needs `address`: the built-in service is reached without it") for name in given)
            )
        elif self.image is not None:
            refuse("env", [problem("image", "and `address` are two services: give one of them")])
        return self


MAX_EXAMPLES = 1_000_000


def _is_examples(value: object) -> bool:
    return type(value) is int and (value == -1 or 0 < value <= MAX_EXAMPLES)


class EvalConfig(ConfigModel):
    """Evaluation on held-out prompts while training."""

    block: ClassVar[str] = "eval."

    env: Annotated[list[EnvConfig], Field(min_length=1)]
    """Environments to evaluate, by id; their held-out prompts are used."""
    num_examples: Annotated[int, one_of(_is_examples, f"must be -1 or a whole number of 1 to {MAX_EXAMPLES}")] = -1
    """Prompts of each environment, 1 to 1,000,000. -1 = all that are held out."""
    rollouts_per_example: Annotated[Size, Field(le=1024)] = 1
    """Rollouts of each prompt, 1 to 1024; their rewards are averaged."""
    interval: Size = 100
    """Steps between evaluations, ≥ 1."""
    eval_base_model: bool = True
    """Also evaluate before the first step."""
    skip_eval_on_resume: bool = True
    """Do not evaluate again at the step that a job resumes from."""
    cancel_inflight_rollouts_on_eval: bool = False
    """Give up the training rollouts that are being generated when an evaluation begins, and generate them again."""
