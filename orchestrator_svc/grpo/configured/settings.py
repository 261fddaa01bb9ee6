"""What a GRPO job is made of, as the runner takes it; `setup.py` makes it from the job's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator_svc.grpo.configured.plan import Plan
from surogate.rpc.channel import ClientSecurity


@dataclass(frozen=True)
class EnvironmentSpec:
    """One environment, as the configuration has it."""

    key: str
    """`name`, or the id: unique in the job."""
    id: str
    config_key: str
    """Where it stands: `orch.env.0`."""
    timeout: float
    """Seconds that one rollout may take to score, or a turn to be answered."""
    max_turns: int | None = None
    """Most turns of the model in an episode, if the configuration says."""
    args: Mapping[str, Any] = field(default_factory=dict)
    address: str | None = None
    """HOST:PORT of the user's own service; None is the built-in one."""
    image: str = ""
    """Image of a service of the job's own, in a pod; empty for none."""
    security: ClientSecurity = field(default_factory=ClientSecurity)
    """How to call that service. The token of the job's workers is not for it."""
    train: bool = True
    """Whether prompts to train on come from it."""
    held_out: int | None = None
    """Held-out prompts to evaluate on: 0 is all, None is no evaluation."""
    rollouts_per_example: int = 1
    """Rollouts of each held-out prompt."""


@dataclass(frozen=True)
class RulerSpec:
    """A judge of groups, as the configuration has it."""

    mode: Literal["replace", "add", "metric"]
    weight: float
    max_concurrent: int
    swallow: bool
    """Whether the job goes on without a score."""
    judge: EnvironmentSpec
    """The environment `judge` of the built-in service, with its arguments."""


@dataclass(frozen=True)
class Settings:
    """One GRPO job."""

    model: str
    """Folder or hub name, for the tokenizer and the chat template."""
    plan: Plan
    environments: Sequence[EnvironmentSpec]
    train: Mapping[str, Any]
    """train.yaml as resolved: the trainer's session is configured by it."""
    timeout: float = 1200.0
    """Seconds that a generation may take, and for which a service that is away is waited for."""
    ruler: RulerSpec | None = None
    lora_rank: int = 0
    """Rank of the adapters that replicas must take; 0 where they need not take any."""
    merge_pushes: bool = False
    """Whether adapters are pushed as weights that they are merged into."""
    adapter_name: str = ""
    """Name under which the adapter is served; empty leaves it to the replicas."""
    resume: bool = False
    """Whether a new job goes on from a checkpoint that is in its folder."""
    resume_step: int | None = None
    """From which one: its step, or None for the newest."""
    skip_progress: bool = False
    """Whether a job that goes on from a checkpoint begins with the first prompts again."""
    skip_buffer: bool = False
    """Whether such a job forgets which prompts had been laid aside."""
    keep_interval: int = 0
    """Checkpoints whose step is a multiple of this stay for good; 0: none."""
    rollout_bytes: int = 4 << 30
    """Room for the rollout store, in bytes; the oldest steps go first. 0: nothing is stored."""
    write_metrics: bool = True
    """Whether to write metrics.jsonl."""
