"""`type: ipo`: weighted log likelihood without the tokens whose probability moved too far, and a pull on ratios."""

from __future__ import annotations

from torch import Tensor

from surogate.config.loss import IpoLoss
from trainer_svc.worker.loss.batch import LossBatch
from trainer_svc.worker.loss.metrics import LossMetrics, loss_metrics


def ipo_loss(config: IpoLoss, batch: LossBatch) -> tuple[Tensor, LossMetrics]:
    """keep = m ∧ −ipo_mask_low ≤ Δ ≤ ipo_mask_high;
    L = ( −Σ_keep sg[(adv_tau·A + teacher_tau·(p_T − p))·min(r, ratio_clip)]·p + kl_tau·Σ_m ℓ² ) / N.

    The pull acts on dropped tokens too, which is what brings them back. ratio_clip caps the weight and drops nothing.
    """
    too_low = batch.mask & (batch.probability_difference < -config.ipo_mask_low)
    too_high = batch.mask & (batch.probability_difference > config.ipo_mask_high)
    keep = batch.mask & ~(too_low | too_high)

    weight = batch.signal(config.adv_tau, config.teacher_tau) * batch.ratio.clamp(max=config.ratio_clip)
    policy = -(weight.where(keep, 0) * batch.p).sum()
    pull = config.kl_tau * batch.log_ratio.square().sum()

    metrics = loss_metrics(batch, {"token_low": too_low, "token_high": too_high})
    return (policy + pull) / batch.num_tokens, metrics
