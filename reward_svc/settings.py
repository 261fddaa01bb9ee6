"""Settings of the built-in reward service."""

from __future__ import annotations

from pydantic import Field

from surogate.reward.settings import RewardSettings


class BuiltInSettings(RewardSettings):
    """Scores rollouts and supplies prompts: the built-in environments, and those of installed packages."""

    processes: int | None = Field(None, ge=1, le=1024)
    """Worker processes that an environment may have at once (`math`, `code`); unset: one a core."""

    allow_unsafe_code: bool = False
    """Let `code` run programs with limits alone where there is no sandbox: only in a container locked down for it."""

    plugins: bool = True
    """Also offer the environments that installed packages bring: entry points `surogate.environments`, and packages
    built on `verifiers`."""
