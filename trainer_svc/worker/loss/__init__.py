"""Policy losses on packed tokens: one entry point, a file per family. Pure functions; nothing here knows a model."""

from __future__ import annotations

from torch import Tensor

from surogate.config.loss import AipoLoss, ClipLoss, DppoLoss, IpoLoss, LossConfig
from trainer_svc.worker.loss.aipo import aipo_loss
from trainer_svc.worker.loss.batch import LossBatch, make_batch
from trainer_svc.worker.loss.clipped import clipped_loss
from trainer_svc.worker.loss.dppo import dppo_loss
from trainer_svc.worker.loss.ipo import ipo_loss
from trainer_svc.worker.loss.metrics import LossMetrics

__all__ = ["LossBatch", "LossMetrics", "policy_loss"]


def policy_loss(
    config: LossConfig,
    trainer_logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    sample_ids: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    num_tokens: Tensor | float | None = None,
    num_samples: Tensor | float | None = None,
    max_completion_length: Tensor | float | None = None,
) -> tuple[Tensor, LossMetrics]:
    """The loss that `config` (train.loss) names, and what it did to the tokens.

    All tensors are flat over T packed tokens of whole samples: the tokens of a sample are in one call, in any order.
    Logprobs are natural logs at the rollout's sampling temperature.

    trainer_logprobs: [T] under the weights in training; the gradient flows into these alone.
    sampler_logprobs: [T] under the weights that generated the tokens.
    advantages: [T]; the same for all tokens of a sample, usually.
    mask: [T] bool, true for the tokens that are trained on. Where it is false all floats are ignored, NaN included.
    sample_ids: [T] integers; equal ids are one sample. They need not be consecutive or start at 0.
    old_logprobs: [T] under the weights before the first of several optimiser steps on the same samples (clip family).
    reference_logprobs: [T] under the reference model, needed where beta is not 0 (clip family).
    teacher_logprobs: [T] under a teacher, needed where teacher_tau is not 0 (ipo, aipo).
    num_tokens, num_samples: trainable tokens and samples of the whole optimiser step, over all micro-batches and ranks;
        None: those of this call. With them the losses and gradients of the micro-batches add up to the step's.
    max_completion_length: most tokens a completion may have (dr_grpo); None: the longest of this call.

    Returns the loss, 0-d, computed in float32 (in float64 for float64 trainer_logprobs), and `LossMetrics`, a mapping
    from metric names to floats that adds up over micro-batches. Without trainable tokens the loss is 0, with a graph.
    Ratios saturate at e^44 (float64: e^354). Raises ValueError for shapes that disagree and for missing logprobs.
    """
    batch = make_batch(
        trainer_logprobs,
        sampler_logprobs,
        advantages,
        mask,
        sample_ids,
        old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs,
        teacher_logprobs=teacher_logprobs,
        num_tokens=num_tokens,
        num_samples=num_samples,
        max_completion_length=max_completion_length,
    )
    match getattr(config, "root", config):
        case IpoLoss() as ipo:
            return ipo_loss(ipo, batch)
        case AipoLoss() as aipo:
            return aipo_loss(aipo, batch)
        case DppoLoss() as dppo:
            return dppo_loss(dppo, batch)
        case ClipLoss() as clip:
            return clipped_loss(clip, batch)
        case other:
            raise TypeError(f"not a loss configuration: {other!r}")
