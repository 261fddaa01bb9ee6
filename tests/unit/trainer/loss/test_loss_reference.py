"""Every loss and its gradient against the formulas written again in plain Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.models.loss_cases import CONFIGS, describe, loss_config, make_tokens, tensors
from tests.helpers.models.loss_reference import gradient, loss
from trainer_svc.worker.loss import policy_loss

LENGTHS = [5, 1, 9, 3, 0, 12]


@pytest.mark.parametrize("old", [False, True], ids=["on-policy", "old-logprobs"])
@pytest.mark.parametrize("case", CONFIGS, ids=describe)
def test_loss_and_gradient_agree_with_the_formula(case: dict[str, Any], old: bool) -> None:
    config = loss_config(case)
    for seed in range(5):
        tokens = make_tokens(seed, LENGTHS, old=old)
        positional, extra = tensors(tokens)
        value, _ = policy_loss(config, *positional, **extra, max_completion_length=16)
        value.backward()
        assert value.item() == pytest.approx(loss(config.root, tokens, max_length=16), rel=1e-9, abs=1e-12)
        expected = gradient(config.root, tokens, max_length=16)
        assert positional[0].grad.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("case", CONFIGS, ids=describe)
def test_float32_is_within_a_millionth(case: dict[str, Any]) -> None:
    config = loss_config(case)
    tokens = make_tokens(7, LENGTHS * 4, old=True)
    positional, extra = tensors(tokens, torch.float32)
    value, _ = policy_loss(config, *positional, **extra, max_completion_length=16)
    exact = [dict(zip(tokens[0], t.values(), strict=True)) for t in tokens]
    for i, token in enumerate(exact):  # the reference sees the same rounded inputs
        token |= {k: v[i].item() for k, v in zip("pqa", positional[:3], strict=True)}
        token |= {k.removesuffix("_logprobs").replace("reference", "ref"): v[i].item() for k, v in extra.items()}
    scale = sum(abs(t["a"]) for t in exact) / len(exact)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(config.root, exact, max_length=16), rel=1e-6, abs=1e-6 * scale)


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(CONFIGS),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.0, 0.01, 0.5, 2.0]),
    old=st.booleans(),
)
def test_any_batch_agrees_with_the_formula(
    case: dict[str, Any], lengths: list[int], seed: int, spread: float, old: bool
) -> None:
    config = loss_config(case)
    tokens = make_tokens(seed, lengths, old=old, spread=spread)
    positional, extra = tensors(tokens)
    value, _ = policy_loss(config, *positional, **extra)
    assert value.item() == pytest.approx(loss(config.root, tokens), rel=1e-9, abs=1e-12)


def test_bfloat16_logprobs_are_computed_in_float32() -> None:
    positional, extra = tensors(make_tokens(0, [4]), torch.bfloat16)
    value, _ = policy_loss(loss_config({"type": "ipo"}), *positional, **extra)
    assert value.dtype == torch.float32


def test_gspo_puts_the_same_gradient_on_every_token_of_a_sample() -> None:
    """On policy c_i is 1 and its gradient with respect to each logprob is 1/n_i: −A/(n_i·B) after averaging."""
    tokens = [{"p": -0.5 - i / 10, "q": -0.5 - i / 10, "a": 2.0, "m": True, "s": 0} for i in range(4)]
    for token in tokens:
        token |= {"ref": 0.0, "teacher": 0.0}
    positional, _ = tensors(tokens)
    policy_loss(loss_config({"type": "gspo"}), *positional)[0].backward()
    assert positional[0].grad.tolist() == pytest.approx([-2.0 / 4] * 4)


def test_ipo_by_hand() -> None:
    """Two tokens: one in the trust region, one whose probability rose by 0.4 and is dropped, but still pulled back."""
    p, q = [math.log(0.5), math.log(0.9)], [math.log(0.4), math.log(0.5)]
    tokens = [{"p": a, "q": b, "a": 1.0, "m": True, "s": 3, "ref": 0, "teacher": 0} for a, b in zip(p, q, strict=True)]
    positional, _ = tensors(tokens)
    value, metrics = policy_loss(loss_config({"type": "ipo", "kl_tau": 0.01}), *positional)
    pull = 0.01 * ((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2)
    assert value.item() == pytest.approx((-1.25 * p[0] + pull) / 2)
    assert metrics["masked/fraction"] == metrics["masked/token_high"] == 0.5
    value.backward()
    assert positional[0].grad.tolist() == pytest.approx([(-1.25 + 0.02 * (p[0] - q[0])) / 2, 0.02 * (p[1] - q[1]) / 2])
