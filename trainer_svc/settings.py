"""Settings of the trainer service."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from surogate.config.service import ServiceSettings


class TrainerSettings(ServiceSettings):
    """Trains a model: PT and SFT sessions by themselves, GRPO sessions a step at a time.

    The model, the data and everything else of a job come with the session; these are the process's own settings.
    """

    model_config = SettingsConfigDict(env_prefix="SUROGATE_TRAINER_")

    scratch_dir: Path = Path("/dev/shm")  # noqa: S108 - memory, on purpose
    """Folder in memory in which weights wait to be pushed."""

    load_timeout: float = Field(3600.0, gt=0)
    """Seconds that a worker may take to load a model before it counts as hung."""

    step_timeout: float = Field(3600.0, gt=0)
    """Seconds that a worker may be silent in a step, a checkpoint or an export before it counts as hung."""

    stop_timeout: float = Field(120.0, gt=0)
    """Seconds that a worker may take to write a checkpoint and end when it is stopped; then it is killed."""

    max_step_samples: int = Field(65_536, ge=1, le=1 << 24)
    """Most samples of a GRPO step; more are refused."""

    max_step_tokens: int = Field(32_000_000, ge=1, le=1 << 36)
    """Most tokens of a GRPO step, over all samples; more are refused."""
