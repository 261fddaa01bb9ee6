"""Packed tokens for the tests of the losses, and the way from them to tensors."""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from surogate.config.grpo import LossConfig
from tests.helpers.models.loss_reference import Token

CONFIGS: list[dict[str, Any]] = [
    {"type": "ipo"},
    {"type": "ipo", "ipo_mask_low": 0.05, "ipo_mask_high": 0.1, "adv_tau": 0.7, "teacher_tau": 0.3, "kl_tau": 0.2},
    {"type": "ipo", "ratio_clip": 1.1, "kl_tau": 0.0},
    {"type": "aipo"},
    {"type": "aipo", "token_mask_low": 0.8, "token_mask_high": 1.3, "teacher_tau": 0.4, "kl_tau": 0.1},
    {"type": "aipo", "ratio_type": "sequence", "sequence_clip_high": 1.2, "geo_mask_low": 0.9, "geo_mask_high": 1.1},
    {"type": "aipo", "ratio_type": "sequence", "sequence_mask_low": 0.7, "sequence_mask_high": 1.5, "adv_tau": 2.0},
    {"type": "dppo"},
    {"type": "dppo", "ipo_mask_low": 0.05, "ipo_mask_high": 0.03, "adv_tau": 0.5, "kl_tau": 0.3},
    {"type": "grpo"},
    {"type": "grpo", "beta": 0.1, "sampler_correction": "token_truncate", "sampler_correction_cap": 1.1},
    {"type": "bnpo", "epsilon_low": 0.1, "epsilon_high": 0.3, "sampler_correction": "token_mask"},
    {"type": "dr_grpo", "sampler_correction": "sequence_truncate", "sampler_correction_cap": 1.2},
    {"type": "dapo", "epsilon_high": 0.28, "sampler_correction": "none", "beta": 0.04},
    {"type": "cispo"},
    {"type": "cispo", "epsilon_high": 1.1, "beta": 0.2, "sampler_correction": "token_mask"},
    {"type": "gspo"},
    {"type": "gspo", "epsilon_low": 0.05, "epsilon_high": 0.05, "sampler_correction": "sequence_truncate"},
]
"""Every loss, with its defaults and with settings under which each of its masks, clips and extra terms takes part."""


def describe(settings: dict[str, Any]) -> str:
    """A test id."""
    return "-".join(str(value) for value in settings.values())


def loss_config(settings: dict[str, Any]) -> LossConfig:
    """train.loss as the trainer gets it."""
    return LossConfig.model_validate(settings)


def make_tokens(
    seed: int, lengths: list[int], *, old: bool = False, spread: float = 0.4, masked: float = 0.2
) -> list[Token]:
    """Random samples of the given lengths, with shuffled, sparse ids; log ratios are normal with deviation `spread`."""
    rng = random.Random(seed)
    ids = rng.sample(range(-50, 1000), len(lengths))
    tokens = []
    for sample_id, length in zip(ids, lengths, strict=True):
        advantage = rng.gauss(0, 1)
        for _ in range(length):
            q = math.log(rng.uniform(0.02, 0.95))
            token = {"q": q, "a": advantage, "s": sample_id, "m": rng.random() >= masked}
            token |= {key: min(q + rng.gauss(0, spread), -1e-3) for key in ("p", "ref", "teacher")}
            tokens.append(token | ({"old": token["p"] + rng.gauss(0, spread / 2)} if old else {}))
    return tokens


def tensors(
    tokens: list[Token], dtype: torch.dtype = torch.float64
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Positional and keyword arguments of `policy_loss`; trainer_logprobs is a leaf that wants a gradient."""

    def column(key: str) -> torch.Tensor:
        return torch.tensor([token[key] for token in tokens], dtype=dtype)

    mask = torch.tensor([token["m"] for token in tokens], dtype=torch.bool)
    sample_ids = torch.tensor([token["s"] for token in tokens], dtype=torch.int64)
    positional = [column("p").requires_grad_(), column("q"), column("a"), mask, sample_ids]
    extra = {"reference_logprobs": column("ref"), "teacher_logprobs": column("teacher")}
    if tokens and "old" in tokens[0]:
        extra["old_logprobs"] = column("old")
    return positional, extra
