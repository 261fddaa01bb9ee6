"""NorMuon (Li et al., 2025, arXiv:2510.05491): Muon whose orthogonal update is normalised neuron by neuron.

For a weight W [m, n] with gradient G, momentum M, and v [m], the running mean square of each row of the update:

    M ← β₁ M + (1 − β₁) G           O = NewtonSchulz(M)          v ← β₂ v + (1 − β₂) mean_n(O²)
    Ô = O / (√v + ε)                W ← W − η λ W − 0.2 η √(mn) / ‖Ô‖ · Ô

The factor gives the update the size that AdamW's has, so that learning rates carry over.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from trainer_svc.worker.shares import by_owners, own

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, steepest at zero (Jordan et al., 2024)."""

ITERATIONS = 5

UPDATE_RMS = 0.2
"""Root mean square of an update at learning rate 1: what AdamW's is in practice (Liu et al., 2025)."""


class NorMuon(torch.optim.Optimizer):
    """For weights of two dimensions; of more, each of the last two is a matrix by itself (experts).

    `cautious`: weights decay only where the update would shrink them too (Chen et al., 2025, arXiv:2510.12402).
    """

    def __init__(
        self,
        weights: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.95,
        beta2: float = 0.95,
        weight_decay: float = 0.0,
        cautious: bool = True,
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "cautious": cautious,
            "eps": eps,
        }
        super().__init__(weights, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step with the gradients that are there."""
        assert closure is None
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            momenta = [self._momentum(weight, group) for weight in weights]
            for weight, update in zip(weights, _orthogonal(momenta), strict=True):
                self._update(weight, update, group)

    def _momentum(self, weight: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """The momentum [..., m, n] with the gradient in it."""
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
            state["row_square"] = torch.zeros_like(weight[..., 0])
        momentum: torch.Tensor = state["momentum"]
        own(momentum).lerp_(own(weight.grad).to(momentum.dtype), 1 - group["momentum"])  # type: ignore[arg-type]
        return momentum

    def _update(self, weight: torch.Tensor, update: torch.Tensor, group: dict[str, Any]) -> None:
        """Moves a weight, or this rank's rows of it, by its orthogonalised momentum."""
        square = own(self.state[weight]["row_square"])
        square.lerp_(update.square().mean(-1), 1 - group["beta2"])
        update = update / (square.sqrt() + group["eps"]).unsqueeze(-1)
        norm = _norm(update, weight).clamp(min=group["eps"])
        update *= UPDATE_RMS * math.sqrt(weight.shape[-2] * weight.shape[-1]) / norm
        decay, weight = group["lr"] * group["weight_decay"], own(weight)
        if decay and group["cautious"]:
            weight.sub_(weight * (update * weight >= 0) * decay)
        elif decay:
            weight.mul_(1 - decay)
        weight.sub_(update, alpha=group["lr"])


def _orthogonal(momenta: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """They, orthogonalised, in their order; of those that are cut over ranks, this rank's rows.

    Of as many matrices as there are ranks each rank is given one, whole. Experts are cut between matrices.
    """
    ranks = momenta[0].device_mesh.size() if momenta and isinstance(momenta[0], DTensor) else 1
    for experts, found in itertools.groupby(momenta, lambda momentum: momentum.dim() > 2):
        alike = list(found)
        if experts or ranks == 1:
            yield from (orthogonalised(own(momentum)) for momentum in alike)
            continue
        for start in range(0, len(alike), ranks):
            yield from by_owners(alike[start : start + ranks], orthogonalised)  # type: ignore[arg-type]


def _norm(update: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Norm of each matrix, [..., 1, 1], of which `update` is this rank's rows if the weight is cut over ranks."""
    norm: torch.Tensor = torch.linalg.matrix_norm(update, keepdim=True)
    if isinstance(weight, DTensor) and weight.dim() == 2:
        square = norm.square()
        dist.all_reduce(square, group=weight.device_mesh.get_group())
        norm = square.sqrt()
    return norm


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """About U Vᵀ for the matrix U Σ Vᵀ: its singular values are brought near 1. Products are bfloat16 on a GPU."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: torch.Tensor = x if wide else x.mT
    return found.to(matrix.dtype)
