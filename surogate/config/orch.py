"""orch.yaml: what is generated, how it is rewarded, and how far generation runs ahead of training."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import InitErrorDetails

from surogate.config import keys
from surogate.config.base import (
    MAX_NUMBER,
    ConfigModel,
    Count,
    Float,
    LocalFolder,
    Positive,
    Rank,
    Seed,
    Size,
    Text,
    Tokens,
    problem,
    refuse,
)
from surogate.config.env import EnvConfig, EvalConfig
from surogate.config.ruler import RulerConfig
from surogate.config.sampling import SamplingConfig
from surogate.config.shaping import AdvantageConfig, BufferConfig, FilterConfig
from surogate.config.types import Address


class PolicyConfig(ConfigModel):
    """The model that samples."""

    block: ClassVar[str] = "model."

    name: Text | None = None
    """Model, as in train.yaml. null = that of the other files."""
    lora_adapter: Text | None = None
    """Name under which the adapter is served. null = `policy`."""
    lora_rank: Rank | None = None
    """Rank of the adapters, 1 to 65,536. null = lora_rank of train.yaml."""
    lora_alpha: Rank | None = None
    """Scale of the adapters, 1 to 65,536. null = lora_alpha of train.yaml."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ClientConfig(ConfigModel):
    """How inference is reached."""

    block: ClassVar[str] = "client."
    without_effect: ClassVar[frozenset[str]] = keys.CLIENT_WITHOUT_EFFECT

    base_url: Annotated[list[Address], BeforeValidator(_as_list)] | None = None
    """gRPC addresses `host:port` of inference services that already run (static launch). null = the launcher's."""
    timeout: Annotated[Positive, Field(le=1_000_000)] = 1200.0
    """Longest time for one request for rollouts, in seconds, > 0, at most 1,000,000 (gRPC takes much longer ones for
    over at once).
    """


class CheckpointConfig(ConfigModel):
    """When checkpoints are made and which are kept."""

    block: ClassVar[str] = "ckpt."
    without_effect: ClassVar[frozenset[str]] = keys.CHECKPOINT_WITHOUT_EFFECT

    interval: Size | None = None
    """Steps between checkpoints, ≥ 1. null = save_steps of train.yaml."""
    resume_step: Annotated[int | None, Field(ge=-1, le=MAX_NUMBER)] = None
    """Step to go on from. -1 = the newest. null = the newest if train.yaml says to resume."""
    keep_last: Size | None = None
    """Number of newest checkpoints to keep, ≥ 1. null = save_total_limit of train.yaml."""
    keep_interval: Size | None = None
    """Also keep each checkpoint whose step is a multiple of this, ≥ 1. null = none."""
    skip_progress: bool = False
    """Resume weights and optimiser alone, and count steps and prompts from the start."""
    skip_buffer: bool = False
    """Resume with all prompts to draw from, also those that had been laid aside as too easy or too hard (buffer)."""


class TrackerConfig(ConfigModel):
    """What goes to Weights & Biases; the trackers of train.yaml's report_to take samples and distributions too."""

    block: ClassVar[str] = "report_to."

    project: Text = "Surogate"
    """Project. wandb_project of train.yaml goes before it."""
    name: Text | None = None
    """Name of the run. null = wandb_name of train.yaml."""
    offline: bool = False
    """Write the run into the output folder, for `wandb sync`, and send nothing."""
    samples: bool | None = None
    """Also report rollouts as text. null = no."""
    distributions: bool | None = None
    """Also report histograms of rewards and completion lengths. null = no."""
    interval: Size = 10
    """Steps between samples and distributions, ≥ 1."""


class OrchConfig(ConfigModel):
    """orch.yaml, every key as an attribute of that name."""

    without_effect: ClassVar[frozenset[str]] = keys.ORCH_WITHOUT_EFFECT
    not_yet: ClassVar[frozenset[str]] = keys.ORCH_NOT_YET

    model: PolicyConfig = PolicyConfig()
    """The model that samples."""
    env: list[EnvConfig]
    """The environments: prompts and rewards. At least one entry."""
    batch_size: Annotated[Size, Field(le=1 << 20)] = 128
    """Rollouts in an optimiser step, a multiple of rollouts_per_example, 2 to 1,048,576."""
    rollouts_per_example: Annotated[Size, Field(le=1024)] = 1
    """Rollouts of each prompt, the group, 2 to 1024: a group of one has no advantage, unless advantage.type is custom.
    """
    seq_len: Tokens = 2048
    """Longest prompt and completion together, in tokens, 2 to 16,777,216. As sequence_len of train.yaml."""
    max_steps: Size | None = None
    """Optimiser steps in all, ≥ 1. As max_steps of train.yaml; one of the two must be set."""
    max_async_level: Annotated[Count, Field(le=1024)] = 1
    """Steps that generation may run ahead of training, 0 to 1024. 0 = strictly on-policy. As in train.yaml."""
    max_off_policy_steps: Count = 8
    """Rollouts older than so many policy versions are discarded, ≥ max_async_level."""
    oversampling_factor: Annotated[Float, Field(ge=1, le=100)] = 1.0
    """Rollouts generated for a step over those it needs, 1 to 100: the first to finish are taken."""
    refill_rounds: Annotated[Count, Field(le=10_000)] = 4
    """Prompts drawn in place of groups that were dropped (equal rewards, failures), at most, as a multiple of a
    step's groups, 0 to 10,000. 0 = off: a step trains on what is left.
    """
    output_dir: LocalFolder = "outputs/run_default"
    """Folder of metrics, logs, plots, checkpoints and the final model or adapter. If unset, output_dir of
    train.yaml.
    """
    seed: Seed = 42
    """Seed of the order of prompts and of sampling, 0 to 2³² − 1."""
    dump_metrics: bool = True
    """Write metrics.jsonl into the output folder, a line per step."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are sampled."""
    advantage: AdvantageConfig = AdvantageConfig()
    """How rewards become advantages."""
    client: ClientConfig = ClientConfig()
    """How inference is reached."""
    ckpt: CheckpointConfig = CheckpointConfig()
    """When checkpoints are made and which are kept."""
    eval: EvalConfig | None = None
    """Evaluation on held-out prompts while training. null = none."""
    buffer: BufferConfig = BufferConfig()
    """Which prompts come when."""
    filters: list[FilterConfig] = Field([])
    """Rollouts that are told apart and perhaps dropped."""
    report_to: TrackerConfig | None = None
    """Weights & Biases: `{}` turns it on with the defaults. null = what report_to of train.yaml says."""
    ruler: RulerConfig = RulerConfig()
    """A judge model that compares the rollouts of a group."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        refuse(
            "orch",
            [*self._group_problems(), *self._length_problems(), *self._env_problems(), *self._buffer_problems()],
        )
        return self

    def _group_problems(self) -> list[InitErrorDetails]:
        group, batch = self.rollouts_per_example, self.batch_size
        if group < 2 and self.advantage.type != "custom":
            message = "must be 2 or more (8, say): a group of one rollout has no advantage, got 1"
            return [problem("rollouts_per_example", message)]
        if batch % group:
            return [problem("batch_size", f"must be a multiple of rollouts_per_example ({group}), got {batch}")]
        return []

    def _length_problems(self) -> list[InitErrorDetails]:
        found = []
        tokens = self.sampling.max_tokens
        if tokens is not None and tokens >= self.seq_len:
            message = f"is {tokens}, which leaves no room for a prompt in seq_len ({self.seq_len})"
            found.append(problem(("sampling", "max_tokens"), message))
        if self.max_off_policy_steps < self.max_async_level:
            message = f"is {self.max_off_policy_steps}, less than max_async_level ({self.max_async_level})"
            found.append(problem("max_off_policy_steps", message))
        return found

    def _env_problems(self) -> list[InitErrorDetails]:
        if not self.env:
            return [problem("env", "must have an entry: `- id: reverse-text`, for example")]
        labels = [env.label for env in self.env]
        twice = [i for i, label in enumerate(labels) if label in labels[:i]]
        if twice:
            message = f"is the second one called {labels[twice[0]]}: give it a `name` of its own"
            return [problem(("env", twice[0]), message)]
        return []

    def _buffer_problems(self) -> list[InitErrorDetails]:
        found, buffer = [], self.buffer
        if buffer.env_ratios is not None and len(buffer.env_ratios) != len(self.env):
            message = f"has {len(buffer.env_ratios)} entries for {len(self.env)} environments"
            found.append(problem(("buffer", "env_ratios"), message))
        if buffer.skip_verification and self.advantage.type != "custom":
            message = "leaves rewards at 0, which teach nothing: it needs advantage.type custom"
            found.append(problem(("buffer", "skip_verification"), message))
        return found
