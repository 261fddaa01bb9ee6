"""How tokens are packed, split and ordered does not change a loss; garbage where the mask is false does not either."""

from __future__ import annotations

import math
import random
from itertools import chain
from typing import Any

import pytest
import torch

from tests.helpers.models.loss_cases import CONFIGS, describe, loss_config, make_tokens, tensors
from tests.helpers.models.loss_reference import Token
from trainer_svc.worker.loss import policy_loss

GARBAGE = [math.nan, math.inf, -math.inf, 1e30]
every_loss = pytest.mark.parametrize("case", CONFIGS, ids=describe)


def evaluate(case: dict[str, Any], tokens: list[Token], **totals: Any) -> tuple[float, list[float], dict[str, float]]:
    positional, extra = tensors(tokens)
    value, metrics = policy_loss(loss_config(case), *positional, **extra, **totals)
    value.backward()
    return value.item(), positional[0].grad.tolist(), dict(metrics)


@every_loss
def test_micro_batches_add_up_to_the_step(case: dict[str, Any]) -> None:
    parts = [make_tokens(seed, [4, 7, 2], old=True) for seed in range(3)]
    for i, part in enumerate(parts):  # ids unique over the step
        for token in part:
            token["s"] = token["s"] * 3 + i
    together = list(chain(*parts))
    totals = {
        "num_tokens": sum(t["m"] for t in together),
        "num_samples": len({t["s"] for t in together}),
        "max_completion_length": 9,
    }
    whole, whole_grad, whole_metrics = evaluate(case, together, max_completion_length=9)
    outcomes = [evaluate(case, part, **totals) for part in parts]
    assert sum(value for value, _, _ in outcomes) == pytest.approx(whole, rel=1e-12)
    assert list(chain(*(grad for _, grad, _ in outcomes))) == pytest.approx(whole_grad, rel=1e-12)

    config = loss_config(case)
    calls = [tensors(part) for part in parts]
    first, second, third = (policy_loss(config, *positional, **extra)[1] for positional, extra in calls)
    assert dict(first + second + third) == pytest.approx(whole_metrics)


@every_loss
def test_totals_may_be_tensors(case: dict[str, Any]) -> None:
    tokens = make_tokens(3, [4, 7, 2])
    numbers = {"num_tokens": 40, "num_samples": 9, "max_completion_length": 12}
    as_tensors = {name: torch.tensor(value) for name, value in numbers.items()}
    assert evaluate(case, tokens, **numbers)[0] == pytest.approx(evaluate(case, tokens, **as_tensors)[0], rel=1e-12)


@every_loss
def test_order_and_interleaving_do_not_matter(case: dict[str, Any]) -> None:
    tokens = make_tokens(1, [5, 3, 8], old=True)
    order = list(range(len(tokens)))
    random.Random(0).shuffle(order)
    value, grad, metrics = evaluate(case, tokens)
    shuffled_value, shuffled_grad, shuffled_metrics = evaluate(case, [tokens[i] for i in order])
    assert shuffled_value == pytest.approx(value, rel=1e-12)
    assert shuffled_grad == pytest.approx([grad[i] for i in order], rel=1e-12)
    assert shuffled_metrics == pytest.approx(metrics)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masked_out_garbage_changes_nothing(case: dict[str, Any], dtype: torch.dtype) -> None:
    clean = make_tokens(2, [6, 4], old=True)
    rng = random.Random(1)
    dirty = [
        t if t["m"] else {**t, **{k: rng.choice(GARBAGE) for k in "pqa"}, "ref": math.nan, "old": math.inf}
        for t in clean
    ]
    results = []
    for tokens in (clean, dirty):
        positional, extra = tensors(tokens, dtype)
        value, metrics = policy_loss(loss_config(case), *positional, **extra)
        value.backward()
        results.append((value.item(), positional[0].grad.tolist(), dict(metrics)))
    assert results[0] == results[1]
    assert all(g == 0 for g, t in zip(results[1][1], dirty, strict=True) if not t["m"])


@every_loss
def test_absurd_ratios_stay_finite(case: dict[str, Any]) -> None:
    tokens = make_tokens(4, [6, 4], masked=0)
    tokens[0] |= {"p": -0.1, "q": -300.0}
    tokens[7] |= {"p": -300.0, "q": -0.1}
    positional, extra = tensors(tokens, torch.float32)
    value, metrics = policy_loss(loss_config(case), *positional, **extra)
    value.backward()
    assert math.isfinite(value.item())
    assert positional[0].grad.isfinite().all()
    assert all(map(math.isfinite, dict(metrics).values()))


@every_loss
@pytest.mark.parametrize("lengths", [[], [4, 2]], ids=["no tokens", "all masked out"])
def test_nothing_to_train_on_is_a_loss_of_zero_with_a_graph(case: dict[str, Any], lengths: list[int]) -> None:
    positional, extra = tensors(make_tokens(0, lengths, masked=1.1))
    value, metrics = policy_loss(loss_config(case), *positional, **extra)
    value.backward()
    assert value.item() == 0
    assert positional[0].grad.abs().sum() == 0
    assert metrics["masked/fraction"] == metrics["ratio/max"] == 0


@pytest.mark.parametrize("wrong", ["sampler_logprobs", "mask", "sample_ids", "old_logprobs"])
def test_shapes_that_disagree_are_refused_by_name(wrong: str) -> None:
    positional, _ = tensors(make_tokens(0, [4]))
    names = ["trainer_logprobs", "sampler_logprobs", "advantages", "mask", "sample_ids"]
    arguments = {**dict(zip(names, positional, strict=True)), "old_logprobs": positional[1].clone()}
    arguments[wrong] = arguments[wrong][:-1]
    with pytest.raises(ValueError, match=wrong):
        policy_loss(loss_config({"type": "ipo"}), **arguments)


@pytest.mark.parametrize(
    ("case", "key"), [({"type": "ipo", "teacher_tau": 0.1}, "teacher_tau"), ({"type": "grpo", "beta": 0.1}, "beta")]
)
def test_missing_logprobs_are_named(case: dict[str, Any], key: str) -> None:
    positional, _ = tensors(make_tokens(0, [4]))
    with pytest.raises(ValueError, match=key):
        policy_loss(loss_config(case), *positional)
