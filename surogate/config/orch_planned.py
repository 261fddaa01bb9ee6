"""Blocks of orch.yaml that shape rewards and prompts: advantages, the buffer and the judge."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from surogate.config.base import NOT_YET, ConfigModel, Float, fail, planned


def _advantage_type(value: Any) -> Any:
    if value == "custom":
        raise fail(f"custom is {NOT_YET}: use default or std_normalized")
    return value


class AdvantageConfig(ConfigModel):
    """How the rewards of a group become advantages."""

    block: ClassVar[str] = "advantage."

    type: Annotated[Literal["default", "std_normalized"], BeforeValidator(_advantage_type)] = "default"
    """default: reward minus the group's mean; std_normalized: that, by the group's standard deviation + 1e-4."""
    length_weighted_mean: bool = False
    """Weight each rollout by its length in the group's mean."""
    import_path: str | None = planned(None)
    """Function that makes the advantages, with type custom."""
    kwargs: dict[str, Any] = planned({})
    """Keyword arguments of that function."""


class BufferConfig(ConfigModel):
    """Which prompts come when."""

    block: ClassVar[str] = "buffer."

    seed: int | None = planned(None)
    """Seed of the order of prompts. null = seed."""
    online_difficulty_filtering: bool = planned(False)
    """Drop groups that are all right or all wrong as they come."""
    easy_threshold: Float | None = planned(None)
    """Mean reward from which a prompt is easy."""
    hard_threshold: Float | None = planned(None)
    """Mean reward up to which a prompt is hard."""
    easy_fraction: Float = planned(0.0)
    """Fraction of easy prompts in a batch."""
    hard_fraction: Float = planned(0.0)
    """Fraction of hard prompts in a batch."""
    normal_pool_min_examples: int = planned(0)
    """Least number of prompts that are neither."""
    recycle_easy_fraction: Float = planned(0.0)
    """Fraction of easy prompts that come back."""
    recycle_hard_fraction: Float = planned(0.0)
    """Fraction of hard prompts that come back."""
    sample_without_replacement: bool = planned(False)
    """Draw no prompt twice before all were drawn."""
    hash_keys: list[str] = planned(["task", "prompt"])
    """Fields of an example that tell it from others."""
    skip_verification: bool = planned(False)
    """Leave rewards unverified."""
    env_ratios: list[Float] | None = planned(None)
    """Share of each environment in a batch."""


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
