"""Thresholds are inclusive: a token exactly on one is kept, and each mask is reported under its own name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.helpers.models.loss_cases import loss_config
from trainer_svc.worker.loss import LossMetrics, policy_loss

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def one_sample(
    settings: dict[str, Any], p: torch.Tensor, q: torch.Tensor, advantage: float = 1.0, **extra: Any
) -> tuple[torch.Tensor, LossMetrics]:
    """The gradient on each token of one sample, and the metrics."""
    p = p.clone().requires_grad_()
    ids = torch.zeros(len(p), dtype=torch.int32)
    value, metrics = policy_loss(
        loss_config(settings), p, q, torch.full_like(q, advantage), torch.ones_like(ids).bool(), ids, **extra
    )
    value.backward()
    assert p.grad is not None
    return p.grad, metrics


def beyond(value: float, towards: float, dtype: torch.dtype) -> float:
    """The next number of that type."""
    return torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(towards, dtype=dtype)).item()


@DTYPES
@pytest.mark.parametrize(
    ("p", "q", "key", "name"), [(0.9, 0.4, "ipo_mask_high", "token_high"), (0.3, 0.8, "ipo_mask_low", "token_low")]
)
@pytest.mark.parametrize("kind", ["ipo", "dppo"])
def test_probability_difference(kind: str, p: float, q: float, key: str, name: str, dtype: torch.dtype) -> None:
    logs = [torch.tensor([x], dtype=dtype).log() for x in (p, q)]
    difference = abs((logs[0].exp() - logs[1].exp()).item())
    advantage = 1.0 if p > q else -1.0
    grad, metrics = one_sample({"type": kind, "kl_tau": 0.0, key: difference}, *logs, advantage)
    assert grad.item() != 0
    assert metrics["masked/fraction"] == 0
    grad, metrics = one_sample({"type": kind, "kl_tau": 0.0, key: beyond(difference, 0, dtype)}, *logs, advantage)
    assert grad.item() == 0
    assert metrics[f"masked/{name}"] == metrics["masked/fraction"] == 1


@pytest.mark.parametrize(("p", "q", "advantage"), [(0.9, 0.1, -1.0), (0.1, 0.9, 1.0)])
def test_dppo_keeps_what_is_pushed_back_towards_the_sampler(p: float, q: float, advantage: float) -> None:
    logs = [torch.tensor([x]).log() for x in (p, q)]
    grad, metrics = one_sample({"type": "dppo", "kl_tau": 0.0}, *logs, advantage)
    assert grad.item() == pytest.approx(-advantage * p / q)
    assert metrics["masked/fraction"] == 0


def test_dppo_with_no_advantage_counts_as_not_positive() -> None:
    logs = [torch.tensor([x]).log() for x in (0.1, 0.9)]
    assert one_sample({"type": "dppo"}, *logs, 0.0)[1]["masked/token_low"] == 1


@DTYPES
@pytest.mark.parametrize(
    ("key", "name", "side"),
    [
        ("token_mask_low", "token_low", -1),
        ("token_mask_high", "token_high", 1),
        ("geo_mask_low", "geo_low", -1),
        ("geo_mask_high", "geo_high", 1),
        ("sequence_mask_low", "sequence_low", -1),
        ("sequence_mask_high", "sequence_high", 1),
    ],
)
def test_aipo_thresholds(key: str, name: str, side: int, dtype: torch.dtype) -> None:
    q = torch.full((1,), -1.0, dtype=dtype)
    p = q + side * 0.25
    ratio = (p - q).exp().item()
    grad, metrics = one_sample({"type": "aipo", key: ratio}, p, q)
    assert grad.item() != 0
    assert metrics["masked/fraction"] == 0
    grad, metrics = one_sample({"type": "aipo", key: beyond(ratio, side * -math.inf, dtype)}, p, q)
    assert grad.item() == 0
    assert metrics[f"masked/{name}"] == metrics["masked/fraction"] == 1


def test_aipo_one_extreme_token_drops_its_whole_sample_and_no_other() -> None:
    p = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    q = torch.tensor([-1.0, -4.0, -1.0, -1.0])
    ids = torch.tensor([7, 7, 2, 2])
    config = loss_config({"type": "aipo", "sequence_mask_high": 3.0, "token_mask_high": 1e9})
    value, metrics = policy_loss(config, p, q, torch.ones(4), torch.ones(4, dtype=torch.bool), ids)
    value.backward()
    assert p.grad is not None
    assert p.grad.tolist() == [0, 0, -0.25, -0.25]
    assert metrics["masked/sequence_high"] == 0.5


def test_aipo_an_extreme_token_that_is_not_trained_on_drops_nothing() -> None:
    p, q = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -90.0])
    config = loss_config({"type": "aipo"})
    _, metrics = policy_loss(config, p, q, torch.ones(2), torch.tensor([True, False]), torch.tensor([0, 0]))
    assert metrics["masked/fraction"] == 0


def test_aipo_ratio_of_a_sample_is_cut_at_e_to_the_ten() -> None:
    settings = {"type": "aipo", "ratio_type": "sequence", "sequence_clip_high": 1e9}
    wide = {"token_mask_high": 1e9, "geo_mask_high": 1e9, "sequence_mask_high": 1e9}
    p, q = torch.full((4,), -1.0), torch.full((4,), -6.0)
    assert one_sample({**settings, **wide}, p, q)[0].tolist() == pytest.approx([-math.exp(10) / 4] * 4)


@DTYPES
def test_sampler_correction_at_its_cap(dtype: torch.dtype) -> None:
    q = torch.tensor([-2.0, -2.0], dtype=dtype)
    p = q + 0.25
    rho = torch.tensor(0.5, dtype=dtype).exp().item()
    settings = {"type": "grpo", "sampler_correction": "sequence_mask"}
    grad, metrics = one_sample({**settings, "sampler_correction_cap": rho}, p, q)
    assert grad.tolist() == pytest.approx([-rho / 2] * 2)
    assert metrics["masked/sampler_correction"] == 0
    grad, metrics = one_sample({**settings, "sampler_correction_cap": beyond(rho, 0, dtype)}, p, q)
    assert grad.tolist() == [0, 0]
    assert metrics["masked/sampler_correction"] == metrics["masked/fraction"] == 1


@pytest.mark.parametrize(("advantage", "change", "name"), [(1.0, 0.5, "clip_high"), (-1.0, -0.5, "clip_low")])
def test_clipping_takes_the_gradient_of_what_moved_far_the_way_it_is_pushed(
    advantage: float, change: float, name: str
) -> None:
    q = torch.tensor([-2.0])
    settings = {"type": "dapo", "sampler_correction": "none"}
    grad, metrics = one_sample(settings, q + change, q, advantage, old_logprobs=q)
    assert grad.item() == 0
    assert metrics[f"masked/{name}"] == 1
    grad, metrics = one_sample(settings, q + change, q, -advantage, old_logprobs=q)
    assert grad.item() != 0
    assert metrics["masked/fraction"] == 0


def test_reported_ratios_and_mismatch() -> None:
    q = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    p = torch.tensor([-1.5, -1.0], dtype=torch.float64)
    _, metrics = one_sample({"type": "ipo"}, p, q)
    logs = (p - q).tolist()
    assert metrics["ratio/mean"] == pytest.approx(sum(map(math.exp, logs)) / 2)
    assert metrics["ratio/max"] == pytest.approx(math.e)
    assert metrics["mismatch_kl"] == pytest.approx(sum(math.exp(x) - x - 1 for x in logs) / 2)
