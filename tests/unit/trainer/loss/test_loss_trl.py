"""The clip family against TRL's GRPOTrainer, whose loss function is called as it is.

They differ in one thing, on purpose: here ρ, the correction for the sampler, also weighs the divergence from the
reference; TRL leaves that term unweighted. So the divergence is compared with the correction off.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.models.loss_cases import describe, loss_config
from trainer_svc.worker.loss import policy_loss

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")

LENGTHS = [6, 2, 5, 1]
MAX_LENGTH = 8
CASES: list[dict[str, Any]] = [
    {"type": kind, **extra}
    for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo")
    for extra in (
        {"sampler_correction": "none"},
        {"sampler_correction": "none", "beta": 0.1},
        {"sampler_correction": "sequence_mask", "sampler_correction_cap": 1.2},
        {"sampler_correction": "token_truncate", "sampler_correction_cap": 1.05},
    )
]


class Batch:
    """Logprobs of a padded batch, [B, T], and the same tokens packed."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(3)
        shape = (len(LENGTHS), max(LENGTHS))
        self.mask = torch.arange(shape[1])[None] < torch.tensor(LENGTHS)[:, None]
        self.sampler = -torch.rand(shape, generator=rng, dtype=torch.float64) * 2 - 0.3
        self.old = self.sampler + torch.randn(shape, generator=rng, dtype=torch.float64) * 0.1
        self.trainer = (self.old + torch.randn(shape, generator=rng, dtype=torch.float64) * 0.2).requires_grad_()
        self.reference = self.old + torch.randn(shape, generator=rng, dtype=torch.float64) * 0.3
        self.advantages = torch.randn(shape[0], generator=rng, dtype=torch.float64)

    def packed(self, values: torch.Tensor) -> torch.Tensor:
        return values.expand_as(self.mask)[self.mask]

    def rows(self) -> torch.Tensor:
        return torch.arange(len(LENGTHS))[:, None]


def correction(settings: dict[str, Any], batch: Batch) -> torch.Tensor:
    """What TRL puts into `importance_sampling_ratio` for these settings."""
    gap = (batch.old - batch.sampler) * batch.mask
    mode, cap = settings["sampler_correction"], settings.get("sampler_correction_cap")
    if mode == "none":
        return torch.ones_like(gap)
    ratio = (gap.sum(-1, keepdim=True) if mode.startswith("sequence") else gap).exp()
    return ratio.clamp(max=cap) if mode.endswith("truncate") else ratio.masked_fill(ratio > cap, 0.0)


def trl_loss(settings: dict[str, Any], batch: Batch) -> torch.Tensor:
    """GRPOTrainer's loss on the batch."""
    config = loss_config(settings).root
    by_sequence = settings["type"] == "gspo"
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.trainer, torch.zeros_like(batch.trainer), None),
        loss_type="grpo" if by_sequence else settings["type"],
        importance_sampling_level="sequence" if by_sequence else "token",
        epsilon_low=config.epsilon_low,
        epsilon_high=config.epsilon_high,
        beta=config.beta,
        max_completion_length=MAX_LENGTH,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": torch.zeros((len(LENGTHS), 1), dtype=torch.long),
        "prompt_mask": torch.ones((len(LENGTHS), 1)),
        "completion_ids": torch.zeros(batch.mask.shape, dtype=torch.long),
        "completion_mask": batch.mask.double(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.reference,
        "importance_sampling_ratio": correction(settings, batch),
        "num_items_in_batch": batch.mask.sum(),
    }
    return grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("settings", CASES, ids=describe)
def test_loss_and_gradient_are_those_of_trl(settings: dict[str, Any]) -> None:
    theirs, ours = Batch(), Batch()
    expected = trl_loss(settings, theirs)
    expected.backward()
    value, _ = policy_loss(
        loss_config(settings),
        ours.packed(ours.trainer),
        ours.packed(ours.sampler),
        ours.packed(ours.advantages[:, None]),
        torch.ones(sum(LENGTHS), dtype=torch.bool),
        ours.packed(ours.rows()),
        old_logprobs=ours.packed(ours.old),
        reference_logprobs=ours.packed(ours.reference),
        max_completion_length=MAX_LENGTH,
    )
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    assert torch.allclose(ours.trainer.grad, theirs.trainer.grad, rtol=1e-9, atol=1e-12)
