"""Settings of a reward service."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from surogate.config.service import ServiceSettings


class RewardSettings(ServiceSettings):
    """Scores rollouts and supplies prompts."""

    model_config = ServiceSettings.model_config | SettingsConfigDict(env_prefix="SUROGATE_REWARD_")

    workers: int = Field(8, ge=1, le=256)
    """Groups that are scored in threads at once; further calls wait within their deadline."""

    item_timeout: float = Field(30.0, gt=0)
    """Seconds that one rollout may take to score, or a turn to be answered, where the caller sets no time."""

    max_group: int = Field(1024, ge=1)
    """Most rollouts in one call."""

    max_hung: int = Field(16, ge=1)
    """Scorers given up that may still run; with so many the process ends, exit code 1, to be started anew."""
