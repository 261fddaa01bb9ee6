"""`rope_scaling` and `max_model_len`, applied to the configuration of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from surogate.config.train import TrainConfig
from surogate.errors import ConfigError, Violation

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""What `llama3` has in all published models, where only its name is given."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers for which some models have rotations of their own. Those with a window need none that reach on."""

_KEPT = ("rope_theta", "partial_rotary_factor")
"""What a scaling of another type leaves as it was."""


def apply_context(config: PretrainedConfig, train: TrainConfig) -> None:
    """Sets RoPE scaling and the context length. Raises ConfigError if sequences would not fit into the context."""
    text = config.get_text_config()
    native = getattr(text, "max_position_embeddings", None)
    rotates = bool(getattr(text, "rope_parameters", None))
    longest, name = train.max_model_len, config.model_type
    if train.rope_scaling is not None and not rotates:
        raise _error("rope_scaling", f"is set, and a {name} has no rotary positions to scale; remove it")
    if longest is not None and native is not None and longest > native and not rotates:
        raise _error(
            "max_model_len", f"is {longest}, and this {name} has learnt {native} positions; lower or remove it"
        )
    scaling = "default"
    if train.rope_scaling is not None:
        scaling = _scale(text, train, native)
    if longest is not None and rotates and scaling != "dynamic":  # which is measured from the length it had
        text.max_position_embeddings = longest
    limit = longest or native
    if limit is not None and train.rope_scaling is None and train.sequence_len > limit:
        raise _error(
            "sequence_len",
            f"{train.sequence_len} exceeds the model's context of {limit} tokens; lower it or set max_model_len and "
            "rope_scaling",
        )


def _scale(text: PretrainedConfig, train: TrainConfig, native: int | None) -> str:
    """Sets the rotations, where each kind of layer has its own those of full attention; returns the type of scaling."""
    every = dict(text.rope_parameters)
    nested = FULL in every or SLIDING in every
    current = every.get(FULL) or {} if nested else every
    rope = _rope(train, native, current)
    text.rope_parameters = {**every, FULL: rope} if nested else rope
    try:
        text.validate_rope()
    except (KeyError, TypeError, ValueError) as error:
        said = str(error.args[0] if error.args else error)
        raise _error("rope_scaling", f"cannot be applied: {said}; give a JSON object with what is missing") from error
    return str(rope["rope_type"])


def _rope(train: TrainConfig, native: int | None, current: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_scaling` as transformers' rope_parameters: a name stretches to `max_model_len` (else `sequence_len`)."""
    value = train.rope_scaling
    if isinstance(value, dict):
        given = {("rope_type" if key == "type" else key): item for key, item in value.items()}
    elif native is None:
        raise _error("rope_scaling", "the model names no context length; give a JSON object with rope_type and factor")
    else:
        longest = train.max_model_len or max(train.sequence_len, native)
        if longest < native:
            raise _error("max_model_len", f"is {longest}, less than the {native} tokens that rope_scaling starts from")
        given = {"rope_type": value, "factor": longest / native, **(LLAMA3 if value == "llama3" else {})}
    kind = given["rope_type"]
    if kind not in ROPE_INIT_FUNCTIONS and kind != "default":
        raise _error("rope_scaling", f"has the rope_type {kind!r}; known are {', '.join(sorted(ROPE_INIT_FUNCTIONS))}")
    factor = given.get("factor")
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1):
        raise _error("rope_scaling", f"has the factor {factor!r}; it must be a number of 1 or more")
    same = current.get("rope_type") == kind
    kept = current if same else {key: current[key] for key in _KEPT if key in current}
    rope = {**kept, **given}
    if kind in ("yarn", "longrope", "llama3") and native is not None:
        rope.setdefault("original_max_position_embeddings", native)
    return rope


def _error(key: str, description: str) -> ConfigError:
    return ConfigError.of([Violation(f"train.{key}", description)])
