"""Rollouts that went wrong: gibberish and repetition, told by their tokens' ids and probabilities.

The criteria are those of PRIME-RL's filters of the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator_svc.grpo.groups import Rollout


@dataclass(frozen=True)
class Filter:
    """One way of telling them."""

    name: str
    finds: Callable[[Rollout, int], bool]
    """`finds(rollout, size of the vocabulary)`."""
    enforce: bool
    """Whether what it finds is dropped, rather than only counted."""


def gibberish(rollout: Rollout, vocabulary: int, *, token_id_threshold: int, logprob_offset: float) -> bool:
    """Whether some token is rare (its id is above the threshold) and was less likely than one drawn at random from the
    vocabulary, by e^logprob_offset."""
    unlikely = rollout.logprobs < -math.log(vocabulary) - logprob_offset
    return bool(np.any(rollout.sampled & (rollout.token_ids > token_id_threshold) & unlikely))


def repetition(rollout: Rollout, _vocabulary: int, *, window: int, prob_threshold: float) -> bool:
    """Whether `window` tokens in a row were each more likely than the threshold."""
    return longest_run(rollout.logprobs[rollout.sampled] > math.log(prob_threshold)) >= window


def longest_run(sure_T: NDArray[np.bool_]) -> int:  # noqa: N803 - T: tokens
    """Length of the longest run of True."""
    padded = np.concatenate([[False], sure_T, [False]]).astype(np.int8)
    changes = np.flatnonzero(np.diff(padded))
    return int((changes[1::2] - changes[::2]).max(initial=0))


def sort_out(
    rollouts: Sequence[Rollout], filters: Sequence[Filter], vocabulary: int
) -> tuple[list[Rollout], dict[str, int]]:
    """The rollouts that no enforced filter found, and how many each filter found."""
    found = {item.name: [item.finds(rollout, vocabulary) for rollout in rollouts] for item in filters}
    dropped = [any(found[item.name][i] for item in filters if item.enforce) for i in range(len(rollouts))]
    kept = [rollout for rollout, drop in zip(rollouts, dropped, strict=True) if not drop]
    return kept, {name: sum(hits) for name, hits in found.items()}
