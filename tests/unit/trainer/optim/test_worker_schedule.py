"""Learning-rate schedules against those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import get_scheduler
from transformers.optimization import get_wsd_schedule

from trainer_svc.worker.optim.schedule import Schedule

TOTAL = 37


def transformers_factors(name: str, warmup: int, **options: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=TOTAL, scheduler_specific_kwargs=options or None
    )
    return rates(optimizer, scheduler)


def rates(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler) -> list[float]:
    found = []
    for _ in range(TOTAL):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def ours(schedule: Schedule) -> list[float]:
    return [schedule.factor(step) for step in range(TOTAL)]


LONG = 2000


@pytest.mark.parametrize("cooldown", [0, 300])
@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd", "constant"])
def test_whole_runs_are_those_of_torch(kind: str, final: float, cooldown: int) -> None:
    warmup = 100
    schedule = schedule_of(kind, LONG, warmup_ratio=warmup / LONG, cooldown_steps=cooldown, final_fraction=final)
    cooldown = LONG // 10 if kind == "wsd" and not cooldown else cooldown
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))], lr=1.0)
    middle = LONG - warmup - cooldown
    falls = kind in ("linear", "cosine")
    parts: list[Any] = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / warmup),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, middle, eta_min=final)
        if kind == "cosine"
        else torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, final if falls else 1.0, total_iters=middle),
    ]
    milestones = [warmup]
    if cooldown:
        start, end = (final, 0.0) if falls else (1.0, final)
        parts.append(torch.optim.lr_scheduler.LinearLR(optimizer, max(start, 1e-300), end, total_iters=cooldown))
        milestones.append(LONG - cooldown)
    reference = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones)
    expected = []
    for _ in range(LONG):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert [schedule.factor(step) for step in range(LONG)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_linear(warmup: int) -> None:
    schedule = Schedule("linear", TOTAL, warmup)
    assert ours(schedule) == pytest.approx(transformers_factors("linear", warmup), abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine(warmup: int, final: float) -> None:
    schedule = Schedule("cosine", TOTAL, warmup, final_fraction=final)
    expected = transformers_factors("cosine_with_min_lr", warmup, min_lr_rate=final)
    assert ours(schedule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.2])
def test_wsd(final: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_wsd_schedule(
        optimizer,
        num_warmup_steps=4,
        num_decay_steps=10,
        num_training_steps=TOTAL,
        decay_type="linear",
        min_lr_ratio=final,
    )
    schedule = Schedule("wsd", TOTAL, 4, cooldown=10, final_fraction=final)
    expected = rates(optimizer, reference)
    # transformers lifts the warm-up by min_lr_ratio as well; here it always starts at 0.
    assert ours(schedule)[4:] == pytest.approx(expected[4:], abs=1e-12)


def test_constant_with_warmup() -> None:
    expected = transformers_factors("constant_with_warmup", 6)
    assert ours(Schedule("constant", TOTAL, 6)) == pytest.approx(expected, abs=1e-12)


def test_linear_ends_at_its_final_fraction() -> None:
    schedule = Schedule("linear", 10, final_fraction=0.3)
    assert schedule.factor(0) == 1
    assert schedule.factor(10) == pytest.approx(0.3)
    assert schedule.factor(1000) == pytest.approx(0.3)


def test_cooldown_after_cosine_goes_from_the_final_fraction_to_zero() -> None:
    schedule = Schedule("cosine", 20, cooldown=5, final_fraction=0.2)
    assert schedule.factor(15) == pytest.approx(0.2)
    assert schedule.factor(20) == pytest.approx(0.0)


def schedule_of(kind: str, total: int, **changes: float) -> Schedule:
    settings = {"warmup_steps": 0, "warmup_ratio": 0.0, "cooldown_steps": 0, "final_fraction": 0.0, **changes}
    return Schedule.of(kind, total, **settings)  # type: ignore[arg-type]


def test_warmup_steps_win_over_the_ratio_which_is_rounded_up() -> None:
    assert schedule_of("linear", 11, warmup_ratio=0.1).warmup == 2
    assert schedule_of("linear", 11, warmup_ratio=0.1, warmup_steps=5).warmup == 5


def test_wsd_without_cooldown_cools_down_over_a_tenth() -> None:
    assert schedule_of("wsd", 200).cooldown == 20


def test_warmup_longer_than_the_run_never_divides_by_zero() -> None:
    schedule = schedule_of("cosine", 3, warmup_steps=10)
    assert [schedule.factor(step) for step in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_without_an_end_the_rate_stays() -> None:
    assert [Schedule("linear", 0, 2).factor(step) for step in (0, 1, 2, 999)] == [0, 0.5, 1, 1]
