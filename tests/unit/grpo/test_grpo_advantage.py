"""Advantages of a group, against a plain reference in rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator_svc.custom_code import check_allowed, load_function
from orchestrator_svc.grpo.configured.advantage import AdvantageFunctionError, advantages, custom, has_signal
from surogate.errors import ConfigError

REWARDS = st.lists(st.floats(-10, 10), min_size=2, max_size=16)


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


@given(REWARDS)
def test_default_removes_the_mean(rewards: list[float]) -> None:
    mean = sum(map(Fraction, rewards)) / len(rewards)
    expected = [float(Fraction(reward) - mean) for reward in rewards]
    np.testing.assert_allclose(advantages(array(*rewards), np.ones(len(rewards))), expected, atol=1e-12)


@given(REWARDS)
def test_std_normalized_divides_by_the_unbiased_deviation(rewards: list[float]) -> None:
    exact = list(map(Fraction, rewards))
    mean = sum(exact) / len(exact)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in exact) / (len(exact) - 1))
    expected = [float(reward - mean) / (deviation + 1e-4) for reward in exact]
    found = advantages(array(*rewards), np.ones(len(rewards)), kind="std_normalized")
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_length_weighted_mean_counts_long_completions_for_more() -> None:
    # The mean is (1·1 + 0·3) / 4.
    found = advantages(array(1, 0), array(1, 3), length_weighted_mean=True)
    np.testing.assert_allclose(found, [0.75, -0.25])


def test_a_rollout_alone_has_nothing_to_be_compared_with() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        advantages(array(1), array(3))


@pytest.mark.parametrize(
    ("rewards", "signal"),
    [((0.5, 0.5, 0.5), False), ((0.1 + 0.2, 0.3), False), ((0.0, 1e-6), True), ((1.0,), False)],
)
def test_equal_rewards_are_no_signal(rewards: tuple[float, ...], signal: bool) -> None:
    assert has_signal(array(*rewards)) is signal


def by_rank(rewards: np.ndarray, lengths: np.ndarray, *, scale: float) -> np.ndarray:
    return scale * rewards.argsort().argsort()


def test_a_function_of_the_users_makes_advantages() -> None:
    function = load_function("tests.unit.grpo.test_grpo_advantage:by_rank", "orch.advantage.import_path")
    found = custom(function, {"scale": 0.5}, "by_rank")(array(0.1, 0.9, 0.4), array(1, 2, 3))
    np.testing.assert_allclose(found, [0, 1, 0.5])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda rewards, lengths: [1.0], "2 finite numbers"),
        (lambda rewards, lengths: [1.0, math.nan], "2 finite numbers"),
        (lambda rewards: [1.0, 2.0], "TypeError"),
        (lambda rewards, lengths: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_what_it_returns_is_checked(function: object, message: str) -> None:
    with pytest.raises(AdvantageFunctionError, match=f"mine.*{message}"):
        custom(function, {}, "mine")(array(0, 1), array(1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["no_such_module:f", "math:no_such_function", "math:pi"])
def test_a_function_that_is_not_there_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match=r"orch\.advantage\.import_path"):
        load_function(path, "orch.advantage.import_path")


def test_only_modules_that_the_settings_name_are_run() -> None:
    check_allowed("mine.advantages:f", ["mine"], "key")
    check_allowed("os:system", ["*"], "key")
    for path in ("os:system", "minefield:f"):
        with pytest.raises(ConfigError, match="custom_modules"):
            check_allowed(path, ["mine"], "key")
