"""What is read off a chunk of logits, and the gradient that goes back into it. On CUDA each is one compiled pass.

Legend: m positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from trainer_svc.worker.device.compiler import can_compile

BLOCK_ELEMENTS = 1 << 18
"""Logits of a chunk of which a CPU keeps something beside them: 1 MiB of float32."""


def statistics(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor | None, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [m, V] → logprob of each target, log of the sum of exponentials, and entropy (zeros unless asked for).

    All [m], in float32 at the least, of logits divided by `temperature[m]`. Uses the logits up.
    """
    if _compiles(logits):
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        found = _compiled(_statistics)(logits, targets, temperature, with_entropy)
        return found
    return _statistics_in_place(logits, targets, temperature, with_entropy)


def coefficients_to_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
) -> torch.Tensor:
    """Gradient [m, V] of Σ coefficients·logprobs with respect to the logits, in their format. Uses the logits up."""
    if _compiles(logits):
        gradient: torch.Tensor = _compiled(_gradient)(logits, targets, temperature, lse, coefficients)
        return gradient
    return _gradient_in_place(logits, targets, temperature, lse, coefficients)


def logprobs_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [m, V] → logprob of each target [m] and the gradient [m, V] of their sum. Uses the logits up.

    On CUDA a negative target stands for no token: its logprob is 0 and has no gradient.
    """
    if _compiles(logits):
        from trainer_svc.worker.logprobs.head_kernel import logprobs_and_gradient_  # Triton, which a CPU may be without

        return logprobs_and_gradient_(logits, targets)
    wide, at_target = _wide(logits), targets[:, None]
    chosen, largest = wide.gather(1, at_target), wide.amax(1, keepdim=True)
    total = wide.sub_(largest).exp_().sum(1, keepdim=True)
    logprobs = (chosen - largest - total.log()).squeeze(1)
    wide.div_(total.neg_())
    wide.scatter_(1, at_target, wide.gather(1, at_target) + 1)
    return logprobs, wide.to(logits.dtype)


def _statistics(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor | None, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = _warmed(logits, temperature)
    lse = wide.logsumexp(-1)
    logprobs = wide.gather(-1, targets[:, None]).squeeze(-1) - lse
    if not with_entropy:
        return logprobs, lse, torch.zeros_like(lse)
    relative = wide - lse[:, None]
    entropy = -(relative.exp() * relative.clamp(min=-1e4)).sum(-1)  # impossible tokens are -inf: 0·(-1e4), not 0·(-inf)
    return logprobs, lse, entropy


def _statistics_in_place(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor | None, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same with little further memory."""
    wide = _wide(logits)
    if temperature is not None:
        wide.div_(temperature.to(wide.dtype)[:, None])
    chosen, largest = wide.gather(1, targets[:, None]).squeeze(1), wide.amax(1)
    total, weighted = torch.zeros_like(largest), torch.zeros_like(largest)
    for relative in torch.split(wide.sub_(largest[:, None]), max(1, BLOCK_ELEMENTS // len(wide)), dim=1):
        weights = relative.exp()
        total += weights.sum(1)
        if with_entropy:
            weighted += weights.mul_(relative.clamp_(min=-1e4)).sum(1)  # of impossible tokens 0·(-1e4), not 0·(-inf)
    lse = largest + total.log()
    entropy = total.log() - weighted / total if with_entropy else weighted
    return chosen - lse, lse, entropy


def _gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
) -> torch.Tensor:
    probability = (_warmed(logits, temperature) - lse[:, None]).exp()
    hit = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    scale = coefficients if temperature is None else coefficients / temperature
    return ((hit.to(probability.dtype) - probability) * scale[:, None]).to(logits.dtype)


def _gradient_in_place(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
) -> torch.Tensor:
    """The same without further memory."""
    wide = _wide(logits)
    if temperature is not None:
        wide.div_(temperature.to(wide.dtype)[:, None])
    scale = (coefficients if temperature is None else coefficients / temperature).to(wide.dtype)
    wide.sub_(lse[:, None]).exp_().mul_(-scale[:, None])
    at_target = targets[:, None]
    wide.scatter_(1, at_target, wide.gather(1, at_target) + scale[:, None])
    return wide.to(logits.dtype)


def _warmed(logits: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
    wide = _wide(logits)
    return wide if temperature is None else wide / temperature.to(wide.dtype)[:, None]


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _compiles(logits: torch.Tensor) -> bool:
    return logits.is_cuda and can_compile()


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
