"""Advantages of a group of rollouts of one prompt: how much better each did than the group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from surogate.errors import FailedPreconditionError

Floats = NDArray[np.float64]

Advantage = Callable[[Floats, Floats], Floats]
"""Advantages (G,) of a group's rewards (G,) and completion lengths in tokens (G,)."""

STD_EPSILON = 1e-4
"""Added to the standard deviation, so that a group of nearly equal rewards does not blow up."""

_EQUAL = 1e-12
"""Rewards closer than this are equal: a sum that was added up in another order is no signal."""


def advantages(
    rewards_G: Floats,  # noqa: N803 - G: rollouts of the group
    lengths_G: Floats,  # noqa: N803
    *,
    kind: Literal["default", "std_normalized"] = "default",
    length_weighted_mean: bool = False,
) -> Floats:
    """A = reward − baseline, of shape (G,).

    The baseline is the group's mean, or with `length_weighted_mean` the mean weighted by the completion lengths (in
    tokens). `std_normalized` divides by the group's unbiased standard deviation + 1e-4.

    Raises:
        ValueError: Fewer than two rollouts: there is nothing to compare with.
    """
    if len(rewards_G) < 2:
        raise ValueError("a group needs at least 2 rollouts")
    weights = lengths_G if length_weighted_mean and lengths_G.sum() > 0 else np.ones_like(rewards_G)
    centred: Floats = rewards_G - np.average(rewards_G, weights=weights)
    if kind == "std_normalized":
        centred /= rewards_G.std(ddof=1) + STD_EPSILON
    return centred


class AdvantageFunctionError(FailedPreconditionError):
    """The user's function failed, or did not return advantages."""

    reason = "ADVANTAGE_FUNCTION_FAILED"


def custom(function: Callable[..., Any], kwargs: Mapping[str, Any], name: str) -> Advantage:
    """The user's function as an `Advantage` that is checked: one finite number for each rollout.

    It raises AdvantageFunctionError, naming the function.
    """

    def call(rewards_G: Floats, lengths_G: Floats) -> Floats:  # noqa: N803
        try:
            found = np.asarray(function(rewards_G.copy(), lengths_G.copy(), **kwargs), np.float64)
        except Exception as error:
            raise AdvantageFunctionError(f"{name} failed: {type(error).__name__}: {error}") from error
        if found.shape != rewards_G.shape or not np.isfinite(found).all():
            raise AdvantageFunctionError(
                f"{name} must return {len(rewards_G)} finite numbers, one for each rollout; it returned {found}"
            )
        return found

    return call


def has_signal(rewards_G: Floats) -> bool:  # noqa: N803
    """Whether the group teaches anything: its rewards are not all equal."""
    return bool(len(rewards_G) > 1 and np.ptp(rewards_G) > _EQUAL)
