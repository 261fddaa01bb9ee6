"""Weights and gradients kept in bfloat16 (`master_dtype`, `gradient_dtype`), while steps are made in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from surogate.config.train import TrainConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def is_narrow(train: TrainConfig) -> bool:
    """Whether weights and gradients are not both float32, or not both what `lora_dtype` says, by one of the keys."""
    natural = train.lora_dtype if train.lora else "fp32"
    return train.master_dtype == "bf16" or train.gradient_dtype not in (None, natural)


def keep_gradients(weights: Iterable[torch.nn.Parameter], train: TrainConfig) -> None:
    """Has backward passes add gradients up in `gradient_dtype`."""
    if train.gradient_dtype is not None:
        for weight in weights:
            weight.grad_dtype = DTYPES[train.gradient_dtype]


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Norm of all gradients, 0-d, in float32 whatever they are."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


@contextmanager
def widened(weights: Iterable[torch.nn.Parameter], scale: torch.Tensor) -> Iterator[None]:
    """Inside, weights and their gradients are float32, the latter multiplied by `scale` (0-d).

    After it weights are what they were again, rounded up or down at random so that the mean is right: steps that are
    too small for the format are not lost. Gradients are gone.
    """
    kept = []
    for weight in weights:
        if weight.grad is None:
            continue
        gradient, before = weight.grad.float() * scale, (weight, weight.dtype, weight.grad_dtype)
        kept.append(before)
        weight.grad, weight.grad_dtype = None, torch.float32
        weight.data = weight.data.float()
        weight.grad = gradient
    yield
    for weight, dtype, gradient_dtype in kept:
        weight.grad = None
        weight.data = rounded(weight.data) if dtype == torch.bfloat16 else weight.data
        weight.grad_dtype = gradient_dtype


def rounded(value: torch.Tensor) -> torch.Tensor:
    """float32 → bfloat16, up with the probability that is the part of the way there. Finite values stay finite or
    become infinite as they would by nearest rounding.
    """
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device)
    return (value.view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()
