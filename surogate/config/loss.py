"""The GRPO losses and their settings: `loss` of train.yaml, a union on `type`.

Without `type`, a block with one of aipo's own keys is `aipo`, any other is `ipo`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, RootModel, model_validator
from pydantic_core import InitErrorDetails, PydanticUndefined

from surogate.config.base import ConfigModel, NonNegative, Positive, fail, problem, refuse

AIPO_PREFIXES = ("ratio_type", "token_mask_", "geo_mask_", "sequence_")
CLIP_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo")
EPSILONS: dict[str, tuple[float, float]] = {"cispo": (0.2, 5.0), "gspo": (3e-4, 4e-4)}


class Loss(ConfigModel):
    """A family of losses."""

    block: ClassVar[str] = "loss."

    @classmethod
    def _unknown_key(cls, key: str, value: object) -> str | None:
        others = [name for family in FAMILIES if key in family.model_fields for name in types_of(family)]
        if others and cls not in (None, Loss):
            return f"belongs to type {' | '.join(others)}, and this loss is {' | '.join(types_of(cls))}"
        return super()._unknown_key(key, value)


class IpoLoss(Loss):
    """Importance-weighted policy gradient, masked by the change in probability."""

    type: Literal["ipo"] = "ipo"
    """Name of the loss."""
    ipo_mask_low: NonNegative = 0.2
    """A token is masked when its probability fell by more than this since it was sampled, ≥ 0."""
    ipo_mask_high: NonNegative = 0.2
    """A token is masked when its probability rose by more than this since it was sampled, ≥ 0."""
    adv_tau: NonNegative = 1.0
    """Weight of the advantage, ≥ 0."""
    teacher_tau: NonNegative = 0.0
    """Weight of the teacher's log ratio, ≥ 0. 0 = no teacher."""
    kl_tau: NonNegative = 1e-3
    """Weight of the squared log ratio to the sampler, also on masked tokens, ≥ 0."""
    ratio_clip: Positive = math.exp(2)
    """Cap of the importance ratio as a weight, > 0."""


class AipoLoss(Loss):
    """Importance-weighted policy gradient, masked by token, geometric-mean and sequence ratios."""

    type: Literal["aipo"] = "aipo"
    """Name of the loss."""
    ratio_type: Literal["token", "sequence"] = "token"
    """Weight of a token: its own ratio, or its sequence's."""
    token_mask_low: NonNegative = 0.125
    """A token whose ratio is below is masked, ≥ 0."""
    token_mask_high: Positive = 8.0
    """A token whose ratio is above is masked, > token_mask_low."""
    geo_mask_low: NonNegative = 0.1
    """A sample whose geometric-mean ratio is below is masked, ≥ 0."""
    geo_mask_high: Positive = 10.0
    """A sample whose geometric-mean ratio is above is masked, > geo_mask_low."""
    sequence_mask_low: NonNegative = 0.0
    """A sample with a token ratio below is masked, ≥ 0."""
    sequence_mask_high: Positive = 100.0
    """A sample with a token ratio above is masked, > sequence_mask_low."""
    sequence_clip_high: Positive = 10.0
    """Cap of the sequence ratio, > 0."""
    kl_tau: NonNegative = 0.0
    """Weight of the log ratio to the sampler, ≥ 0."""
    adv_tau: NonNegative = 1.0
    """Weight of the advantage, ≥ 0."""
    teacher_tau: NonNegative = 0.0
    """Weight of the teacher's log ratio, ≥ 0. 0 = no teacher."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        refuse("loss", (wrong for name in ("token", "geo", "sequence") for wrong in self._range(name)))
        return self

    def _range(self, name: str) -> list[InitErrorDetails]:
        low, high = getattr(self, f"{name}_mask_low"), getattr(self, f"{name}_mask_high")
        message = f"must be less than {name}_mask_high ({high}), got {low}"
        return [problem(f"{name}_mask_low", message)] if low >= high else []


class DppoLoss(Loss):
    """Policy gradient through the ratio, masked where the probability has moved far in the advantage's direction."""

    type: Literal["dppo"] = "dppo"
    """Name of the loss."""
    ipo_mask_low: NonNegative = 0.2
    """A token of advantage ≤ 0 is masked when its probability fell by more than this, ≥ 0."""
    ipo_mask_high: NonNegative = 0.2
    """A token of advantage > 0 is masked when its probability rose by more than this, ≥ 0."""
    adv_tau: NonNegative = 1.0
    """Weight of the advantage, ≥ 0."""
    teacher_tau: NonNegative = 0.0
    """Weight of the teacher's log ratio, ≥ 0. This loss has no such term: 0 only."""
    kl_tau: NonNegative = 1e-3
    """Weight of the squared log ratio to the sampler, ≥ 0."""


class ClipLoss(Loss):
    """The losses that clip the ratio to the old policy, corrected for the sampler's difference from it."""

    type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo"]
    """Name of the loss: how it clips and how it averages."""
    epsilon_low: NonNegative = 0.2
    """The ratio is clipped from below at 1 − epsilon_low, ≥ 0. gspo: 3e-4 unless set."""
    epsilon_high: NonNegative = 0.2
    """The ratio is clipped from above at 1 + epsilon_high, ≥ 0. gspo: 4e-4 unless set. cispo: the cap itself, 5.0
    unless set.
    """
    beta: NonNegative = 0.0
    """Weight of the divergence from the reference (the model without the adapter), ≥ 0. 0 = no reference is
    computed.
    """
    sampler_correction: Literal["sequence_mask", "sequence_truncate", "token_mask", "token_truncate", "none"] = (
        "sequence_mask"
    )
    """What is done about a trainer that disagrees with the sampler: ratio by sequence or token, masked or truncated."""
    sampler_correction_cap: Positive = 3.0
    """Ratio above which the correction masks or truncates, > 0."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_type(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if not isinstance(kind, str) or kind not in EPSILONS:
            return data
        low, high = EPSILONS[kind]
        return {"epsilon_low": low, "epsilon_high": high, **data}


FAMILIES: tuple[type[Loss], ...] = (IpoLoss, AipoLoss, DppoLoss, ClipLoss)


def types_of(family: type[Loss]) -> tuple[str, ...]:
    """The values of `type` that a family has."""
    names: tuple[str, ...] = family.model_fields["type"].annotation.__args__  # type: ignore[union-attr]
    return names


class LossConfig(RootModel[Annotated[IpoLoss | AipoLoss | DppoLoss | ClipLoss, Field(discriminator="type")]]):
    """`loss` of train.yaml. `LossConfig(type="gspo").root` is the ClipLoss; an empty block is `ipo`."""

    root: Annotated[IpoLoss | AipoLoss | DppoLoss | ClipLoss, Field(discriminator="type")] = IpoLoss()

    @model_validator(mode="before")
    @classmethod
    def _infer_type(cls, data: Any) -> Any:
        if data is None or data is PydanticUndefined:
            return {"type": "ipo"}
        if not isinstance(data, dict):
            if isinstance(data, Loss):
                return data
            raise fail("must be a mapping (lines of `key: value`)")
        if data.get("type") is not None:
            return data
        is_aipo = any(str(key).startswith(AIPO_PREFIXES) for key in data)
        return {**data, "type": "aipo" if is_aipo else "ipo"}

    @property
    def type(self) -> str:
        """Name of the loss."""
        return self.root.type
