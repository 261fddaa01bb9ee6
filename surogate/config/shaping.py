"""Blocks of orch.yaml that decide which prompts come, which rollouts count, and what an advantage is."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from surogate.config.base import ConfigModel, Count, Float, Fraction, Positive, Seed, Text, Tokens, problem, refuse

_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*[:.][A-Za-z_]\w*")


class AdvantageConfig(ConfigModel):
    """How the rewards of a group become advantages."""

    block: ClassVar[str] = "advantage."

    type: Literal["default", "std_normalized", "custom"] = "default"
    """default: reward minus the group's mean; std_normalized: that, by the group's standard deviation + 1e-4; custom:
    by the function at `import_path`.
    """
    length_weighted_mean: bool = False
    """Weight each rollout by its length in the group's mean."""
    import_path: Text | None = None
    """Function `module:name` that makes the advantages, with type custom: `f(rewards, lengths, **kwargs)`, with arrays
    of a group's rewards and completion lengths in tokens, returns one number for each. The orchestrator must allow its
    module (`custom_modules`).
    """
    kwargs: dict[str, Any] = Field({})
    """Keyword arguments of that function."""

    @model_validator(mode="after")
    def _custom_has_a_function(self) -> Self:
        custom = self.type == "custom"
        found = []
        if custom and self.import_path is None:
            found.append(problem("import_path", "must name a function, `module:name`, where type is custom"))
        if self.import_path is not None and not _IMPORT_PATH.fullmatch(self.import_path):
            found.append(problem("import_path", f"must look like `module:name`, got {self.import_path!r}"))
        if not custom:
            given = [name for name in ("import_path", "kwargs") if getattr(self, name)]
            found += [problem(name, "has a meaning with `type: custom` only") for name in given]
        if custom and self.length_weighted_mean:
            found.append(problem("length_weighted_mean", "has no meaning with `type: custom`"))
        refuse("advantage", found)
        return self


class BufferConfig(ConfigModel):
    """Which prompts come when. Prompts are drawn from the normal pool; easy and hard ones are laid aside."""

    block: ClassVar[str] = "buffer."

    seed: Seed | None = None
    """Seed of the order of prompts, 0 to 2³² − 1. null = seed."""
    online_difficulty_filtering: bool = False
    """Do not train on groups whose mean reward is 0 or 1. Groups of equal rewards are left out anyway, unless
    advantage.type is custom.
    """
    easy_threshold: Float | None = None
    """Mean reward of a group from which its prompt is easy: it is laid aside. null = none is."""
    hard_threshold: Float | None = None
    """Mean reward of a group up to which its prompt is hard: it is laid aside. null = none is."""
    easy_fraction: Fraction = 0.0
    """Part of the easy prompts, 0 to 1, that is drawn again when a job goes on from a checkpoint."""
    hard_fraction: Fraction = 0.0
    """Part of the hard prompts, 0 to 1, that is drawn again when a job goes on from a checkpoint."""
    normal_pool_min_examples: Count = 0
    """When no more prompts than this are left to draw from, some of those laid aside come back."""
    recycle_easy_fraction: Fraction = 0.0
    """Part of the easy prompts, 0 to 1, that comes back then; at least one unless 0."""
    recycle_hard_fraction: Fraction = 0.0
    """Part of the hard prompts, 0 to 1, that comes back then; at least one unless 0."""
    sample_without_replacement: bool = False
    """Draw no prompt twice in a job. When all are drawn, steps train on what is left, then the job fails by name."""
    hash_keys: Annotated[list[Text], Field(min_length=1)] = Field(["task", "prompt"])
    """What tells an example from others when a job goes on from a checkpoint: task (its environment), prompt, answer,
    id, or fields of its own.
    """
    skip_verification: bool = False
    """Ask for no rewards: all are 0. Needs advantage.type custom."""
    env_ratios: Annotated[list[Positive], Field(min_length=1)] | None = None
    """Share of each environment of `env` in the prompts, in the same order; any scale. null = by the number of their
    prompts.
    """

    @model_validator(mode="after")
    def _thresholds_apart(self) -> Self:
        easy, hard = self.easy_threshold, self.hard_threshold
        if easy is not None and hard is not None and hard >= easy:
            refuse("buffer", [problem("hard_threshold", f"must be below easy_threshold ({easy:g}), got {hard:g}")])
        return self


class FilterConfig(ConfigModel):
    """A way of finding rollouts that went wrong. How many there are is a metric; enforced, they are not trained on."""

    block: ClassVar[str] = "filters."

    type: Literal["gibberish", "repetition"]
    """gibberish: a rare token (id above token_id_threshold) that was less likely than chance; repetition: `window`
    tokens in a row each with a probability above prob_threshold.
    """
    enforce: bool = False
    """Drop the rollouts that are found, before they are scored; otherwise only count them."""
    token_id_threshold: Count = 100_000
    """gibberish: tokens with higher ids are rare, ≥ 0."""
    logprob_offset: Float = 2.0
    """gibberish: a token is too unlikely when its logprob is below −log(vocabulary) − this."""
    window: Tokens = 3000
    """repetition: tokens in a row, 1 to 16,777,216."""
    prob_threshold: Annotated[Float, Field(gt=0, lt=1)] = 0.99
    """repetition: probability above which a token is sure, 0 to 1."""
