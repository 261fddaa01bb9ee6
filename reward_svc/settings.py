"""Settings of the built-in reward service."""

from __future__ import annotations

from surogate.reward.settings import RewardSettings


class BuiltInSettings(RewardSettings):
    """Scores rollouts and supplies prompts: the built-in environments, and those of installed packages."""

    plugins: bool = True
    """Also offer the environments that installed packages bring (entry points `surogate.environments`)."""
