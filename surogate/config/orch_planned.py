"""The block of orch.yaml for rewards from a judge."""

from __future__ import annotations

from typing import ClassVar

from surogate.config.base import ConfigModel, Float, planned


class RulerConfig(ConfigModel):
    """Rewards from a judge model."""

    block: ClassVar[str] = "ruler."
    not_yet: ClassVar[frozenset[str]] = frozenset({"judge", "sampling", "extra_body", "cost"})

    enabled: bool = planned(False)
    """Whether a judge is asked."""
    mode: str = planned("replace")
    """What its score does to the reward."""
    judge_model: str | None = planned(None)
    """Model that judges."""
    rubric: str | None = planned(None)
    """What it is told to look at."""
    weight: Float = planned(1.0)
    """Weight of its score."""
    max_concurrent_judges: int = planned(32)
    """Requests at once."""
    request_timeout: Float | None = planned(None)
    """Longest time for a request, in seconds."""
    max_retries_on_parse_error: int = planned(2)
    """Repeats when its answer is not understood."""
    swallow_exceptions: bool = planned(True)
    """Go on without a score when it fails."""
