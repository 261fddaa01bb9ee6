"""The tokens of a call, cleaned: what every loss computes from.

Names are the formulas': p trainer, q sampler, A advantage, m trainable mask, ℓ = p − q, r = e^ℓ. Shapes: T packed
tokens, S samples in this call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trainer_svc.worker.loss.numeric import at_least_one, safe_exp


@dataclass(frozen=True)
class LossBatch:
    """Cleaned inputs. Where the mask is false every float is 0, whatever was given there, and so is its gradient."""

    p: Tensor
    """Trainer logprobs, [T]; the only ones that carry a gradient."""
    q: Tensor
    """Sampler logprobs, [T]."""
    advantages: Tensor
    """A, [T]."""
    mask: Tensor
    """m: the token is trained on, bool [T]."""
    sample: Tensor
    """Index of each token's sample in this call, int64 [T], in [0, S)."""
    old: Tensor | None
    """p_old, [T]; None: p itself, as a constant."""
    reference: Tensor | None
    """p_ref, [T]."""
    teacher: Tensor | None
    """p_T, [T]."""
    tokens_per_sample: Tensor
    """n: number of trainable tokens of each sample, [S]."""
    num_tokens: Tensor | float
    """N: trainable tokens of the optimiser step, at least 1."""
    num_samples: Tensor | float
    """B: samples of the optimiser step, at least 1."""
    max_completion_length: Tensor | float
    """Tokens that a completion may have at most, at least 1."""

    @cached_property
    def log_ratio(self) -> Tensor:
        """ℓ = p − q, [T], with gradient."""
        return self.p - self.q

    @cached_property
    def ratio(self) -> Tensor:
        """r = e^ℓ, [T], without gradient."""
        return safe_exp(self.log_ratio.detach())

    @cached_property
    def probability_difference(self) -> Tensor:
        """Δ = e^p − e^q, [T], without gradient."""
        return self.p.detach().exp() - self.q.exp()

    def sample_sum(self, values: Tensor) -> Tensor:
        """Sums per sample. values: [T], 0 where not meant → [S]."""
        return values.new_zeros(self.tokens_per_sample.shape).index_add(0, self.sample, values)

    def sample_mean(self, values: Tensor) -> Tensor:
        """Sums per sample over its trainable tokens' number. values: [T], 0 where not meant → [S]."""
        return self.sample_sum(values) / self.tokens_per_sample.clamp(min=1)

    def sample_range(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest per sample over its trainable tokens. values: [T] → [S], [S]; (inf, −inf) without any."""
        shape = self.tokens_per_sample.shape
        low = values.new_full(shape, torch.inf)
        high = values.new_full(shape, -torch.inf)
        low = low.scatter_reduce(0, self.sample, values.where(self.mask, torch.inf), "amin")
        high = high.scatter_reduce(0, self.sample, values.where(self.mask, -torch.inf), "amax")
        return low, high

    def signal(self, adv_tau: float, teacher_tau: float) -> Tensor:
        """adv_tau·A + teacher_tau·(p_T − p), [T], without gradient."""
        if teacher_tau == 0:
            return adv_tau * self.advantages
        if self.teacher is None:
            raise ValueError("train.loss.teacher_tau is not 0, and there are no teacher logprobs")
        return adv_tau * self.advantages + teacher_tau * (self.teacher - self.p.detach())


def make_batch(
    trainer_logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    sample_ids: Tensor,
    *,
    old_logprobs: Tensor | None,
    reference_logprobs: Tensor | None,
    teacher_logprobs: Tensor | None,
    num_tokens: Tensor | float | None,
    num_samples: Tensor | float | None,
    max_completion_length: Tensor | float | None,
) -> LossBatch:
    """Cleans the arguments of `policy_loss`. Raises ValueError if their shapes disagree."""
    shape = _common_shape(
        trainer_logprobs=trainer_logprobs,
        sampler_logprobs=sampler_logprobs,
        advantages=advantages,
        mask=mask,
        sample_ids=sample_ids,
        old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs,
        teacher_logprobs=teacher_logprobs,
    )
    dtype = torch.promote_types(trainer_logprobs.dtype, torch.float32)
    mask = mask.bool()

    def clean(values: Tensor) -> Tensor:
        return values.to(dtype).where(mask, 0)

    def constant(values: Tensor | None) -> Tensor | None:
        return None if values is None else clean(values.detach())

    ids, sample = sample_ids.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    tokens_per_sample = torch.zeros(ids.shape, dtype=dtype, device=mask.device)
    tokens_per_sample = tokens_per_sample.index_add(0, sample.view(shape), mask.to(dtype))
    longest = tokens_per_sample.max() if len(ids) else 1
    return LossBatch(
        p=clean(trainer_logprobs),
        q=clean(sampler_logprobs.detach()),
        advantages=clean(advantages.detach()),
        mask=mask,
        sample=sample,
        old=constant(old_logprobs),
        reference=constant(reference_logprobs),
        teacher=constant(teacher_logprobs),
        tokens_per_sample=tokens_per_sample,
        num_tokens=at_least_one(mask.sum() if num_tokens is None else num_tokens),
        num_samples=at_least_one(len(ids) if num_samples is None else num_samples),
        max_completion_length=at_least_one(longest if max_completion_length is None else max_completion_length),
    )


def _common_shape(**tensors: Tensor | None) -> torch.Size:
    shape = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        shape = tensor.shape if shape is None else shape
        if tensor.dim() != 1 or tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; all of a loss's tensors are flat, of one length")
    assert shape is not None
    return shape
