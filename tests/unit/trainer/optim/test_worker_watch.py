"""Runs that change their own course: early_stop, auto_lr_reduction, epoch_adjustment."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models.engine import KeepingReporter, open_engine
from tests.helpers.models.tiny import make_counting
from trainer_svc.worker.engine import Engine
from trainer_svc.worker.optim.watch import EarlyStop, SpikeGuard, epochs_for


def guarded(losses: list[float], norms: list[float] | None = None) -> tuple[SpikeGuard, list[int]]:
    """A guard that saw these steps, and in which of them it halved."""
    guard = SpikeGuard()
    norms = norms or [1.0] * len(losses)
    return guard, [step for step, seen in enumerate(zip(losses, norms, strict=True)) if guard.step(*seen)]


def test_a_spike_of_the_loss_halves() -> None:
    guard, halved = guarded([2.0] * 60 + [2.6] + [2.0] * 60)
    assert (guard.factor, halved) == (0.5, [60])


def test_a_rise_within_three_deviations_or_of_less_than_a_half_does_not() -> None:
    assert guarded([2.0] * 60 + [2.4])[1] == []
    assert guarded([2.0, 4.0] * 40 + [5.0])[1] == []
    assert guarded([2.0, 4.0] * 40 + [6.5])[1] == [80]


def test_an_explosion_of_the_gradient_halves() -> None:
    assert guarded([2.0] * 61, [1.0] * 60 + [10.5])[1] == [60]
    assert guarded([2.0] * 61, [1.0] * 60 + [9.5])[1] == []


def test_nothing_is_judged_in_the_first_steps_nor_after_a_reduction() -> None:
    assert guarded([2.0] * 49 + [90.0])[1] == []
    assert guarded([2.0] * 50 + [90.0] * 20)[1] == [50]


def test_no_more_than_five_reductions() -> None:
    guard, halved = guarded(([2.0] * 50 + [90.0]) * 9)
    assert (guard.factor, len(halved)) == (1 / 32, 5)


def test_five_evaluations_without_a_better_one_end_the_run() -> None:
    watch = EarlyStop()
    for loss in (3.0, 2.0, 1.9995, 2.5, 2.1, 2.0):
        watch.evaluation(loss)
        assert watch.reason is None
    watch.evaluation(2.3)
    assert watch.reason == "no evaluation was better than 2 in the last 5"


def test_a_plateau_of_the_loss_ends_the_run() -> None:
    watch = EarlyStop()
    for step in range(2000):
        watch.step(max(3 - step / 1000, 2.0))
        if watch.reason:
            break
    assert 1500 <= step <= 1530
    assert watch.reason is not None and "did not fall below 2" in watch.reason


def test_divergence_ends_the_run() -> None:
    watch = EarlyStop()
    for step in range(1000):
        watch.step(2.0 if step < 100 else 4.0)
        if watch.reason:
            break
    assert 300 <= step <= 320
    assert watch.reason is not None and "above 1.5 times 2" in watch.reason


def test_a_falling_loss_goes_on() -> None:
    watch = EarlyStop()
    for step in range(3000):
        watch.step(5 * math.exp(-step / 1500))
        assert watch.reason is None


@pytest.mark.parametrize(("parameters", "tokens", "epochs"), [(100, 1000, 2), (100, 10**9, 1), (1000, 100, 200)])
def test_epochs_make_twenty_tokens_a_weight(parameters: int, tokens: int, epochs: int) -> None:
    assert epochs_for(parameters, tokens) == epochs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_counting(tmp_path_factory.mktemp("model"), layers=1, hidden=32)


def opened(folder: Path, out: Path, **keys: Any) -> tuple[Engine, KeepingReporter]:
    train = {
        "model": str(folder), "datasets": [{"path": str(folder / "data.jsonl"), "type": "text"}], "sequence_len": 128,
        "lora": False, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "recompute": False,
    }  # fmt: skip
    return open_engine("pt", out, {**train, **keys})


def test_a_run_ends_early_with_its_model_and_stays_ended(folder: Path, tmp_path: Path) -> None:
    keys = {"early_stop": True, "learning_rate": 0.0, "eval_steps": 2, "max_steps": 40}
    engine, reporter = opened(folder, tmp_path, **keys)
    assert not engine.run().stopped
    assert max(reporter.steps) == 12  # the first evaluation, and five that are no better
    assert reporter.warnings[-1].startswith("early_stop: ends after step 12 of 40: no evaluation was better than 5.5")
    assert reporter.checkpoints == [(12, str(tmp_path / "checkpoint-12"), False), (12, str(tmp_path), True)]
    again, second = opened(folder, tmp_path, **keys)
    again.run()
    assert second.steps == {}


def test_a_spike_lowers_the_rates_that_follow_and_a_resumed_run_keeps_them(folder: Path, tmp_path: Path) -> None:
    keys = {"auto_lr_reduction": True, "lr_scheduler_type": "constant", "learning_rate": 1e-4, "max_steps": 5}
    engine, reporter = opened(folder, tmp_path, **keys, save_steps=3)
    engine.session.watch({"spikes": {"factor": 1.0, "losses": [0.5] * 50, "norms": [1.0] * 50}})
    engine.run()
    assert [reporter.steps[step]["lr"] for step in sorted(reporter.steps)] == [1e-4] + [5e-5] * 4
    assert "learning rates are 0.5 times the schedule's now" in reporter.warnings[-1]
    resumed, _ = opened(folder, tmp_path, **{**keys, "max_steps": 7})
    assert resumed.session.optimizer.learning_rate(5) == 5e-5


def test_epochs_by_the_size_of_the_model(folder: Path, tmp_path: Path) -> None:
    engine, reporter = opened(folder, tmp_path, epoch_adjustment=True)
    run = engine._run
    assert run is not None
    tokens, weights = run._data.training.num_tokens, engine.session.policy.model.num_parameters()
    assert run.total_steps == round(20 * weights / tokens) * run._plan.steps_per_epoch
    assert f"20 tokens for each of {weights:,} weights, and the data has {tokens:,}" in reporter.warnings[-1]
