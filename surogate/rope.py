"""RoPE scaling (`rope_scaling`) of a model's configuration: trainer and inference must rotate alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from surogate.errors import ConfigError, Violation

LENGTH = "max_model_len"
"""In an object: the context length to stretch to, from which the factor is taken where there is none."""

_BY_FACTOR = ("linear", "dynamic", "yarn", "llama3")
"""Types of scaling that one factor describes."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""What `llama3` has in all published models, where only its name is given."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers for which some models have rotations of their own. Those with a window need none that reach on."""

_KEPT = ("rope_theta", "partial_rotary_factor")
"""What a scaling of another type leaves as it was."""


def as_object(scaling: str | Mapping[str, Any], max_model_len: int | None) -> dict[str, Any]:
    """`rope_scaling`, a name or an object, as an object that needs no other key."""
    given: dict[str, Any] = {"rope_type": scaling} if isinstance(scaling, str) else dict(scaling)
    if "type" in given:
        given.setdefault("rope_type", given.pop("type"))
    if max_model_len is not None:
        given.setdefault(LENGTH, max_model_len)
    return given


def scale_rope(text: Any, scaling: Mapping[str, Any], known: Collection[str], key: str) -> None:
    """Sets `rope_parameters` and `max_position_embeddings` of the configuration of transformers of a text model.

    Where each kind of layer has rotations of its own, those of full attention are scaled.

    Args:
        text: The configuration, a PreTrainedConfig.
        scaling: As `as_object` makes it.
        known: Types of scaling that transformers has.
        key: The key of the user's file that says so, for errors.

    Raises:
        ConfigError: The model has no rotary positions, or cannot be scaled so.
    """
    every = dict(getattr(text, "rope_parameters", None) or {})
    if not every:
        raise _error(key, f"is set, and a {text.model_type} has no rotary positions to scale; remove it")
    nested = FULL in every or SLIDING in every
    native = getattr(text, "max_position_embeddings", None)
    rope = _rope(scaling, native, (every.get(FULL) or {}) if nested else every, known, key)
    text.rope_parameters = {**every, FULL: rope} if nested else rope
    try:
        text.validate_rope()
    except (KeyError, TypeError, ValueError) as error:
        said = str(error.args[0] if error.args else error)
        raise _error(key, f"cannot be applied: {said}; give a JSON object with what is missing") from error
    if scaling.get(LENGTH) is not None and rope["rope_type"] != "dynamic":  # which is measured from the length it had
        text.max_position_embeddings = scaling[LENGTH]


def _rope(
    scaling: Mapping[str, Any], native: int | None, current: Mapping[str, Any], known: Collection[str], key: str
) -> dict[str, Any]:
    """The scaling as transformers' rope_parameters."""
    given = dict(scaling)
    kind, longest = given["rope_type"], given.pop(LENGTH, None)
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int) or longest < 1):
        raise _error(key, f"has the {LENGTH} {longest!r}; it must be a number of tokens")
    if kind not in known and kind != "default":
        raise _error(key, f"has the rope_type {kind!r}; known are {', '.join(sorted(known))}")
    if "factor" not in given and longest is not None and kind in _BY_FACTOR:
        given["factor"] = _factor(longest, native, key)
    factor = given.get("factor")
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1):
        raise _error(key, f"has the factor {factor!r}; it must be a number of 1 or more")
    if kind == "llama3":
        given = {**LLAMA3, **given}
    kept = current if current.get("rope_type") == kind else {name: current[name] for name in _KEPT if name in current}
    rope = {**kept, **given}
    if kind in ("yarn", "longrope", "llama3") and native is not None:
        rope.setdefault("original_max_position_embeddings", native)
    return rope


def _factor(longest: int, native: int | None, key: str) -> float:
    if native is None:
        raise _error(key, "the model names no context length; give a JSON object with rope_type and factor")
    if longest < native:
        where = key.replace("rope_scaling", LENGTH)
        raise _error(where, f"is {longest}, less than the {native} tokens that rope_scaling starts from")
    return longest / native


def _error(key: str, description: str) -> ConfigError:
    return ConfigError.of([Violation(key, description)])
