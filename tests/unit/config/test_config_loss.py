"""`loss` of train.yaml: a union on `type`, which may be left out."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from surogate.config.grpo import CLIP_TYPES, AipoLoss, ClipLoss, IpoLoss, LossConfig
from surogate.config.problems import violations_of


@pytest.mark.parametrize(
    ("block", "kind"),
    [
        (None, "ipo"),
        ({}, "ipo"),
        ({"kl_tau": 0.0}, "ipo"),
        ({"type": None}, "ipo"),
        ({"ratio_type": "token"}, "aipo"),
        ({"token_mask_low": 0.1}, "aipo"),
        ({"geo_mask_high": 5}, "aipo"),
        ({"sequence_clip_high": 5}, "aipo"),
        ({"type": "dppo", "ipo_mask_low": 0.1}, "dppo"),
        *(({"type": kind}, kind) for kind in CLIP_TYPES),
    ],
)
def test_the_type_is_told_from_the_keys(block: dict[str, Any] | None, kind: str) -> None:
    assert LossConfig.model_validate(block).root.type == kind
    assert LossConfig.model_validate(block).type == kind


def test_keyword_arguments_make_a_block() -> None:
    assert LossConfig() == LossConfig(type="ipo")
    assert LossConfig(type="gspo", beta=0.1).root == ClipLoss(
        type="gspo", epsilon_low=3e-4, epsilon_high=4e-4, beta=0.1
    )


def test_defaults_are_those_of_the_family() -> None:
    assert IpoLoss().ratio_clip == pytest.approx(math.e**2)
    assert (IpoLoss().kl_tau, AipoLoss().kl_tau) == (1e-3, 0.0)
    epsilons = {kind: ClipLoss.model_validate({"type": kind}) for kind in CLIP_TYPES}
    assert {kind: (loss.epsilon_low, loss.epsilon_high) for kind, loss in epsilons.items()} == {
        "grpo": (0.2, 0.2),
        "bnpo": (0.2, 0.2),
        "dr_grpo": (0.2, 0.2),
        "dapo": (0.2, 0.2),
        "cispo": (0.2, 5.0),
        "gspo": (3e-4, 4e-4),
    }
    assert all(loss.sampler_correction == "sequence_mask" for loss in epsilons.values())


@pytest.mark.parametrize("kind", ["ipo", "aipo", "dppo", *CLIP_TYPES])
def test_a_dumped_block_is_the_same_block(kind: str) -> None:
    loss = LossConfig.model_validate({"type": kind})
    assert LossConfig.model_validate(loss.model_dump(mode="json")) == loss


CLIP = "grpo | bnpo | dr_grpo | dapo | cispo | gspo"


@pytest.mark.parametrize(
    ("block", "messages"),
    [
        (
            {"type": "ipos"},
            [
                "loss: `type` must be one of ipo, aipo, dppo, grpo, bnpo, dr_grpo, dapo, cispo, gspo; got 'ipos'; "
                "did you mean `ipo`?"
            ],
        ),
        ({"epsilon_low": 0.1}, [f"loss.epsilon_low: belongs to type {CLIP}, and this loss is ipo"]),
        ({"ratio_type": "token", "beta": 0.1}, [f"loss.beta: belongs to type {CLIP}, and this loss is aipo"]),
        ({"ratio_type": "token", "ratio_clip": 2}, ["loss.ratio_clip: belongs to type ipo, and this loss is aipo"]),
        (
            {"type": "grpo", "ipo_mask_low": 0.1},
            [f"loss.ipo_mask_low: belongs to type ipo | dppo, and this loss is {CLIP}"],
        ),
        ({"type": "grpo", "betta": 0.1}, ["loss.betta: unknown key; did you mean `beta`?"]),
        ({"kl_tau": -1}, ["loss.kl_tau: must be 0 or more, got -1"]),
        ({"kl_tau": math.nan}, ["loss.kl_tau: must be a finite number, got nan"]),
        ({"ratio_clip": 0}, ["loss.ratio_clip: must be greater than 0, got 0"]),
        (
            {"token_mask_low": 9, "geo_mask_low": 10},
            [
                "loss.token_mask_low: must be less than token_mask_high (8.0), got 9.0",
                "loss.geo_mask_low: must be less than geo_mask_high (10.0), got 10.0",
            ],
        ),
        (["ipo"], ["loss: must be a mapping (lines of `key: value`)"]),
        ("ipo", ["loss: must be a mapping (lines of `key: value`)"]),
    ],
)
def test_what_is_wrong_is_named(block: Any, messages: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        LossConfig.model_validate(block)
    assert [str(item) for item in violations_of(caught.value, "loss")] == messages
