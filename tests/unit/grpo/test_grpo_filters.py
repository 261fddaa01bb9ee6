"""Finding rollouts that went wrong."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from orchestrator_svc.grpo.configured.filters import Filter, gibberish, longest_run, repetition, sort_out
from orchestrator_svc.grpo.groups import Rollout
from surogate.v1 import common_pb2

VOCABULARY = 1000
GIBBERISH = partial(gibberish, token_id_threshold=500, logprob_offset=2.0)
REPETITION = partial(repetition, window=3, prob_threshold=0.9)


def rollout(ids: list[int], probabilities: list[float]) -> Rollout:
    return Rollout(
        "r", np.array(ids, np.int32), np.log(np.array(probabilities, np.float32)), common_pb2.FINISH_REASON_STOP, []
    )


@pytest.mark.parametrize(
    ("ids", "probabilities", "found"),
    [
        ([1, 600], [0.5, 1e-4], True),  # 1/1000 · e⁻² is about 1.35e-4
        ([1, 600], [0.5, 2e-4], False),  # rare, and as likely as may be
        ([1, 400], [0.5, 1e-9], False),  # unlikely, and not rare
        ([], [], False),
    ],
)
def test_gibberish_is_a_rare_token_that_was_less_likely_than_chance(
    ids: list[int], probabilities: list[float], found: bool
) -> None:
    assert GIBBERISH(rollout(ids, probabilities), VOCABULARY) is found


@pytest.mark.parametrize(
    ("probabilities", "found"),
    [([0.95, 0.99, 0.95], True), ([0.95, 0.99, 0.5, 0.95], False), ([0.1, 0.99, 0.99, 0.99], True), ([], False)],
)
def test_repetition_is_a_run_of_sure_tokens(probabilities: list[float], found: bool) -> None:
    assert REPETITION(rollout([1] * len(probabilities), probabilities), VOCABULARY) is found


def test_the_longest_run_against_a_plain_count() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        sure = random.random(int(random.integers(0, 30))) < 0.6
        runs = "".join("1" if item else "0" for item in sure).split("0")
        assert longest_run(sure) == max(map(len, runs))


@pytest.mark.parametrize(("enforce", "kept"), [(False, 3), (True, 2)])
def test_what_is_found_is_counted_and_dropped_only_if_enforced(enforce: bool, kept: int) -> None:
    rollouts = [rollout([1], [0.5]), rollout([600], [1e-9]), rollout([2] * 4, [0.99] * 4)]
    filters = [Filter("gibberish", GIBBERISH, enforce), Filter("repetition", REPETITION, enforce=False)]
    left, counts = sort_out(rollouts, filters, VOCABULARY)
    assert len(left) == kept
    assert counts == {"gibberish": 1, "repetition": 1}
    assert math.isfinite(left[0].logprobs[0])
