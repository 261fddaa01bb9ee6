"""`type: grpo | bnpo | dr_grpo | dapo | cispo | gspo`: the clipped surrogate, its variants, and how they average."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from surogate.config.loss import ClipLoss
from trainer_svc.worker.loss.batch import LossBatch
from trainer_svc.worker.loss.metrics import LossMetrics, loss_metrics
from trainer_svc.worker.loss.numeric import k3, safe_exp


def clipped_loss(config: ClipLoss, batch: LossBatch) -> tuple[Tensor, LossMetrics]:
    """c = exp(p − p_old), for gspo exp of its mean over the sample; per token
    ( −min(c·A, clip(c, 1−epsilon_low, 1+epsilon_high)·A) + beta·(e^d − d − 1) )·ρ with d = p_ref − p, for cispo
    ( −sg[min(c, epsilon_high)]·A·p + … )·ρ. ρ corrects p_old against the sampler's q.
    """
    old = batch.p.detach() if batch.old is None else batch.old
    change = batch.p - old
    if config.type == "gspo":
        change = batch.sample_mean(change)[batch.sample]
    ratio = safe_exp(change)
    correction, corrected_away = _sampler_correction(config, batch, old)

    policy, dropped = _surrogate(config, batch, ratio)
    divergence = _divergence(config.beta, batch)
    per_token = ((policy + config.beta * divergence) * correction).where(batch.mask, 0)

    means = {"reference_kl": divergence} if config.beta else {}
    metrics = loss_metrics(batch, {**dropped, "sampler_correction": corrected_away}, means)
    return _average(config, batch, per_token), metrics


def _surrogate(config: ClipLoss, batch: LossBatch, ratio: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The per-token policy term, [T], and the tokens whose gradient clipping takes away."""
    if config.type == "cispo":
        return -ratio.detach().clamp(max=config.epsilon_high) * batch.advantages * batch.p, {}
    low, high = 1 - config.epsilon_low, 1 + config.epsilon_high
    term = -torch.minimum(ratio * batch.advantages, ratio.clamp(low, high) * batch.advantages)
    clipped = {
        "clip_low": batch.mask & (batch.advantages < 0) & (ratio < low),
        "clip_high": batch.mask & (batch.advantages > 0) & (ratio > high),
    }
    return term, clipped


def _divergence(beta: float, batch: LossBatch) -> Tensor:
    """e^d − d − 1, [T]; zeros when beta is 0."""
    if beta == 0:
        return torch.zeros_like(batch.p)
    if batch.reference is None:
        raise ValueError("train.loss.beta is not 0, and there are no reference logprobs")
    return k3(batch.reference - batch.p)


def _sampler_correction(config: ClipLoss, batch: LossBatch, old: Tensor) -> tuple[Tensor, Tensor]:
    """ρ, [T], without gradient, and the tokens it zeroes."""
    if config.sampler_correction == "none":
        return torch.ones_like(old), torch.zeros_like(batch.mask)
    log_rho = old - batch.q
    level, action = config.sampler_correction.split("_")
    if level == "sequence":
        log_rho = batch.sample_sum(log_rho)[batch.sample]
    rho = safe_exp(log_rho)
    if action == "truncate":
        return rho.clamp(max=config.sampler_correction_cap), torch.zeros_like(batch.mask)
    above = batch.mask & (rho > config.sampler_correction_cap)
    return rho.where(~above, 0), above


def _average(config: ClipLoss, batch: LossBatch, per_token: Tensor) -> Tensor:
    match config.type:
        case "grpo" | "gspo":
            return batch.sample_mean(per_token).sum() / batch.num_samples
        case "bnpo" | "dapo" | "cispo":
            return per_token.sum() / batch.num_tokens
        case "dr_grpo":
            return per_token.sum() / (batch.num_samples * batch.max_completion_length)
        case other:
            assert_never(other)
