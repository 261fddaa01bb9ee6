"""`type: dppo`: the importance-weighted advantage; tokens that moved far already, the way they are pushed, go."""

from __future__ import annotations

from torch import Tensor

from surogate.config.loss import DppoLoss
from trainer_svc.worker.loss.batch import LossBatch
from trainer_svc.worker.loss.metrics import LossMetrics, loss_metrics
from trainer_svc.worker.loss.numeric import safe_exp


def dppo_loss(config: DppoLoss, batch: LossBatch) -> tuple[Tensor, LossMetrics]:
    """Dropped: A > 0 and Δ > ipo_mask_high, or A ≤ 0 and Δ < −ipo_mask_low;
    L = ( −Σ_keep adv_tau·A·r + kl_tau·Σ_m ℓ² ) / N, the gradient flowing through r.
    """
    up = batch.advantages > 0
    too_high = batch.mask & up & (batch.probability_difference > config.ipo_mask_high)
    too_low = batch.mask & ~up & (batch.probability_difference < -config.ipo_mask_low)
    keep = batch.mask & ~(too_low | too_high)

    ratio = safe_exp(batch.log_ratio.where(keep, 0))
    policy = -config.adv_tau * (batch.advantages.where(keep, 0) * ratio).sum()
    pull = config.kl_tau * batch.log_ratio.square().sum()

    metrics = loss_metrics(batch, {"token_low": too_low, "token_high": too_high})
    return (policy + pull) / batch.num_tokens, metrics
