"""train.yaml: PT, SFT, and the trainer's side of GRPO. All keys are flat; each theme is a class of its own."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from surogate.config import keys
from surogate.config.base import (
    NOT_YET,
    ConfigModel,
    Count,
    LocalFile,
    Positive,
    Text,
    fail,
    problem,
    refuse,
)
from surogate.config.data import ChatKeys, DataKeys
from surogate.config.lora import LoraKeys, QloraKeys
from surogate.config.loss import LossConfig
from surogate.config.model import BatchKeys, ModelKeys, RunKeys
from surogate.config.optim import MemoryKeys, OptimizerKeys, ParallelKeys, PrecisionKeys

TRACKERS = ("tensorboard", "wandb", "mlflow")
"""Trackers that there are."""


def _trackers(value: Any) -> Any:
    """A list of names without repeats; null for `none`."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return value
    names = [name for name in dict.fromkeys(names) if name != "none"]
    if "aim" in names:
        raise fail(f"aim is {NOT_YET}: use {', '.join(TRACKERS)}")
    return names or None


class ReportingKeys(ConfigModel):
    """Trackers and logs beside metrics.jsonl."""

    report_to: Annotated[list[Literal["tensorboard", "wandb", "mlflow"]] | None, BeforeValidator(_trackers)] = None
    """Trackers to report to: tensorboard, wandb, mlflow, one or a list; `none` or null = none. metrics.jsonl is always
    written.
    """
    log_file: LocalFile | None = None
    """File to which a line is added for each step and evaluation; a relative path starts at output_dir."""
    wandb_project: Text | None = None
    """Project at Weights & Biases, and experiment at MLflow. null = Surogate."""
    wandb_name: Text | None = None
    """Name of the run at the trackers. null = run_name, or the job's id."""
    log_gpu_util: Count = 100
    """Optimiser steps between reports of the GPU's utilisation, power and temperature, ≥ 0. 0 = never. Needs
    nvidia-ml-py; without it, and on a CPU, nothing is reported.
    """
    peak_tflops: Positive | None = None
    """What a device can compute in dense products, 10¹² operations a second: what MFU is a share of, > 0. null = the
    peak in bfloat16 that the maker of the GPU publishes, where it is known here; no MFU elsewhere.
    """


class AutomationKeys(ConfigModel):
    """Training that changes its own course."""

    early_stop: bool = False
    """End the run when the loss no longer falls: five evaluations without a better one, 500 steps without a better mean
    of the last 20 losses (better: by 0.1 %), or 200 steps at more than 1.5 times the best mean. PT and SFT.
    """
    auto_lr_reduction: bool = False
    """Halve the learning rate after a spike, at most five times: a loss above the mean of the last 100 by three
    standard deviations and by 0.5, or a gradient of more than 10 times their mean norm. Nothing is judged in the first
    50 steps, nor in the 50 after a reduction.
    """
    epoch_adjustment: bool = False
    """Choose num_epochs by the size of the model: as many as make 20 tokens of training for each of its weights, at
    least 1. PT and SFT, without max_steps.
    """

    @model_validator(mode="after")
    def _epochs_are_free(self) -> Self:
        if self.epoch_adjustment and getattr(self, "max_steps", -1) > 0:
            refuse("train", [problem("epoch_adjustment", "chooses num_epochs, which max_steps overrides: remove one")])
        return self


class NoiseScheduler(ConfigModel):
    """Noise on the policy that samples, so that it explores: on the weights of its norms, in pushes alone."""

    block: ClassVar[str] = "noise_scheduler."

    enabled: bool = False
    """Whether noise is added. Needs lora: false: pushes of adapters have no norms in them."""
    sigma_start: Positive = 5e-2
    """Standard deviation in the second stage, > 0."""
    sigma_end: Positive = 5e-4
    """Standard deviation in the last stage, > 0."""
    num_stages: Annotated[int, Field(ge=2, le=10_000)] = 10
    """Equal stages of the run, 2 to 10,000: one without noise, then from sigma_start to sigma_end by equal factors."""


class GrpoKeys(ConfigModel):
    """The trainer's side of GRPO. Without meaning in PT and SFT."""

    loss: LossConfig = LossConfig()
    """The policy loss: a block with `type` and that type's settings."""
    max_async_level: Annotated[Count, Field(le=1024)] = 1
    """Steps that generation may run ahead of training, 0 to 1024. 0 = strictly on-policy. Also in orch.yaml."""
    doc_masking: bool = True
    """Keep attention inside each rollout of a packed sequence."""
    single_sample_bins: bool = False
    """Train on one rollout a sequence instead of packing several."""
    noise_scheduler: NoiseScheduler = NoiseScheduler()
    """Noise on the policy that samples."""

    @model_validator(mode="after")
    def _noise_has_norms(self) -> Self:
        if self.noise_scheduler.enabled and getattr(self, "lora", False):
            text = "needs lora: false: pushes of adapters have no norms in them"
            refuse("train", [problem(("noise_scheduler", "enabled"), text)])
        return self


GRPO_ONLY = tuple(GrpoKeys.model_fields)
"""Keys that mean something in GRPO alone."""


class TrainConfig(
    RunKeys,
    ModelKeys,
    BatchKeys,
    OptimizerKeys,
    MemoryKeys,
    ParallelKeys,
    PrecisionKeys,
    LoraKeys,
    QloraKeys,
    DataKeys,
    ChatKeys,
    ReportingKeys,
    AutomationKeys,
    GrpoKeys,
):
    """train.yaml, every key as an attribute of that name."""

    renamed: ClassVar[dict[str, str]] = {"min_lr_ratio": "final_lr_fraction"}
    without_effect: ClassVar[frozenset[str]] = keys.TRAIN_WITHOUT_EFFECT
    not_yet: ClassVar[frozenset[str]] = keys.TRAIN_NOT_YET


_THEMES = [theme for theme in TrainConfig.__bases__ if issubclass(theme, ConfigModel)]
IN_ORDER = tuple(name for theme in _THEMES for name in theme.model_fields)
"""The keys as people look for them: the run and the model first. Pydantic's own order begins with the last theme."""
