"""How completions are sampled. What training could not reproduce is refused."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from surogate.config.base import ConfigModel, Float, Seed, Tokens, one_of, problem, refuse, shown

CHANGES = "changes the sampler's distribution in a way that training does not reproduce"
NEUTRAL: dict[str, tuple[object, ...]] = {
    "top_p": (1, None),
    "top_k": (-1, 0, None),
    "min_p": (0, None),
    "typical_p": (1, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": (None, {}),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "ignore_eos": (False, None),
    "extra_body": (None, {}),
}
"""Settings of other samplers, and the values with which they do nothing."""

Temperature = Annotated[Float, Field(ge=0.01, le=2)]
"""What vLLM samples at: it refuses more, and takes 0.01 for less without a word, which training would not."""


class TemperatureSchedule(ConfigModel):
    """A temperature that changes from the first step to the last."""

    block: ClassVar[str] = "sampling.temp_scheduler."

    type: Literal["linear", "cosine"] = "linear"
    """Shape of the change."""
    start_temperature: Temperature
    """Temperature of the first step, 0.01 to 2."""
    end_temperature: Temperature
    """Temperature of the last step, 0.01 to 2."""


def _is_one(value: object) -> bool:
    return not isinstance(value, bool) and value == 1


def _is_zero(value: object) -> bool:
    return not isinstance(value, bool) and value == 0


class SamplingConfig(ConfigModel):
    """How completions are sampled."""

    block: ClassVar[str] = "sampling."

    max_tokens: Tokens | None = None
    """Longest completion in tokens, ≥ 1, less than seq_len. null = what the prompt leaves of seq_len."""
    temperature: Temperature = 1.0
    """Temperature, 0.01 to 2: greedy sampling has nothing to learn from."""
    temp_scheduler: TemperatureSchedule | None = None
    """Temperature by step, in place of `temperature`. null = constant."""
    repetition_penalty: Annotated[Float, one_of(_is_one, f"must be 1.0: a penalty {CHANGES}")] = 1.0
    """1.0 only: a penalty changes the sampler's distribution in a way that training does not reproduce."""
    min_tokens: Annotated[int, one_of(_is_zero, f"must be 0: a least length {CHANGES}")] = 0
    """0 only: a least length changes the sampler's distribution in a way that training does not reproduce."""
    seed: Seed | None = None
    """Seed of sampling, 0 to 2³² − 1. null = from the seed of the run."""

    @model_validator(mode="after")
    def _one_temperature(self) -> Self:
        if self.temp_scheduler is not None and "temperature" in self.model_fields_set and self.temperature != 1.0:
            refuse("sampling", [problem("temperature", "is set beside temp_scheduler: remove one of them")])
        return self

    @classmethod
    def _unknown_key(cls, key: str, value: object) -> str | None:
        if key not in NEUTRAL:
            return super()._unknown_key(key, value)
        neutral: Any = NEUTRAL[key]
        return None if value in neutral else f"must be {shown(neutral[0])}, got {shown(value)}: it {CHANGES}"
