"""`type: aipo`: importance-weighted log likelihood, masked by the token's ratio, the sample's mean and its extremes."""

from __future__ import annotations

from torch import Tensor

from surogate.config.loss import AipoLoss
from trainer_svc.worker.loss.batch import LossBatch
from trainer_svc.worker.loss.metrics import LossMetrics, loss_metrics
from trainer_svc.worker.loss.numeric import safe_exp

SEQUENCE_LOG_LIMIT = 10.0
"""A sample's summed log ratio is cut here before it is exponentiated."""


def aipo_loss(config: AipoLoss, batch: LossBatch) -> tuple[Tensor, LossMetrics]:
    """coef = sg[w·(adv_tau·A + teacher_tau·(p_T − p) − kl_tau·ℓ)] with w = r (ratio_type token) or seq_i (sequence);
    L = −Σ_kept coef·p / N (token) or −Σ_i (Σ_kept coef·p / max(n_i, 1)) / B (sequence).
    """
    dropped = _dropped(config, batch)
    keep = batch.mask
    for tokens in dropped.values():
        keep = keep & ~tokens

    by_token = config.ratio_type == "token"
    weight = batch.ratio if by_token else _sequence_ratio(config, batch)[batch.sample]
    log_ratio = batch.log_ratio.detach()
    coef = weight * (batch.signal(config.adv_tau, config.teacher_tau) - config.kl_tau * log_ratio)
    objective = coef.where(keep, 0) * batch.p

    metrics = loss_metrics(batch, dropped)
    if by_token:
        return -objective.sum() / batch.num_tokens, metrics
    return -batch.sample_mean(objective).sum() / batch.num_samples, metrics


def _dropped(config: AipoLoss, batch: LossBatch) -> dict[str, Tensor]:
    """Trainable tokens that each mask drops, bool [T]."""
    geo = safe_exp(batch.sample_mean(batch.log_ratio.detach()))
    lowest, highest = batch.sample_range(batch.ratio)
    dropped = {
        "token_low": batch.ratio < config.token_mask_low,
        "token_high": batch.ratio > config.token_mask_high,
        "geo_low": (geo < config.geo_mask_low)[batch.sample],
        "geo_high": (geo > config.geo_mask_high)[batch.sample],
        "sequence_low": (lowest < config.sequence_mask_low)[batch.sample],
        "sequence_high": (highest > config.sequence_mask_high)[batch.sample],
    }
    return {name: batch.mask & tokens for name, tokens in dropped.items()}


def _sequence_ratio(config: AipoLoss, batch: LossBatch) -> Tensor:
    """seq_i = min(exp(min(Σ_m ℓ, 10)), sequence_clip_high), [S]."""
    total = batch.sample_sum(batch.log_ratio.detach())
    return total.clamp(max=SEQUENCE_LOG_LIMIT).exp().clamp(max=config.sequence_clip_high)
