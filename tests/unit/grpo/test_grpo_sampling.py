"""Temperatures by step, and seeds that are the same whenever a prompt is drawn again."""

from __future__ import annotations

import pytest

from orchestrator_svc.grpo.configured.sampling import Sampling, TemperatureSchedule, prompt_seed


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("constant", [1.0, 1.0, 1.0]), ("linear", [1.0, 0.75, 0.5]), ("cosine", [1.0, 0.75, 0.5])],
)
def test_schedules_go_from_start_to_end(shape: str, expected: list[float]) -> None:
    schedule = TemperatureSchedule(1.0, 0.5, shape)  # type: ignore[arg-type]
    assert [schedule.at(step, 5) for step in (1, 3, 5)] == pytest.approx(expected)


def test_cosine_is_flat_at_the_ends() -> None:
    cosine = TemperatureSchedule(1.0, 0.0, "cosine")
    linear = TemperatureSchedule(1.0, 0.0, "linear")
    assert cosine.at(2, 11) > linear.at(2, 11)
    assert cosine.at(10, 11) < linear.at(10, 11)


def test_the_temperature_is_the_float32_that_travels() -> None:
    temperature = TemperatureSchedule(0.8, 0.8).at(1, 10)
    assert temperature != 0.8
    assert temperature == pytest.approx(0.8, abs=1e-7)


def test_seeds_depend_on_job_purpose_and_ordinal_alone() -> None:
    assert prompt_seed(1, "train", 5) == prompt_seed(1, "train", 5)
    seeds = {prompt_seed(seed, purpose, n) for seed in range(5) for purpose in ("train", "eval") for n in range(500)}
    assert len(seeds) == 5000
    assert max(seeds) < 2**48


def test_a_completion_never_leaves_the_context() -> None:
    sampling = Sampling(seed=0, schedule=TemperatureSchedule(1, 1), max_tokens=100)
    assert sampling.params(temperature=1, purpose="train", ordinal=0, prompt_tokens=50, context=120).max_tokens == 70
    assert sampling.params(temperature=1, purpose="train", ordinal=0, prompt_tokens=5, context=120).max_tokens == 100
