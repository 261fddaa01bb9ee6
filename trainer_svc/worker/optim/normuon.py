"""NorMuon (Li et al., 2025, arXiv:2510.05491): Muon whose orthogonal update is normalised neuron by neuron.

For a weight W [m, n] with gradient G, momentum M, and v [m], the running mean square of each row of the update:

    M ← β₁ M + (1 − β₁) G           O = NewtonSchulz(M)          v ← β₂ v + (1 − β₂) mean_n(O²)
    Ô = O / (√v + ε)                W ← W − η λ W − 0.2 η √(mn) / ‖Ô‖ · Ô

The factor gives the update the size that AdamW's has, so that learning rates carry over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

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
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
            state["row_square"] = weight.new_zeros(weight.shape[:-1])
        momentum: torch.Tensor = state["momentum"]
        square: torch.Tensor = state["row_square"]
        momentum.lerp_(weight.grad.to(momentum.dtype), 1 - group["momentum"])  # type: ignore[union-attr]
        update = orthogonalised(momentum)
        square.lerp_(update.square().mean(-1), 1 - group["beta2"])
        update = update / (square.sqrt() + group["eps"]).unsqueeze(-1)
        norm = torch.linalg.matrix_norm(update, keepdim=True).clamp(min=group["eps"])
        update *= UPDATE_RMS * math.sqrt(weight.shape[-2] * weight.shape[-1]) / norm
        decay = group["lr"] * group["weight_decay"]
        if decay and group["cautious"]:
            weight.sub_(weight * (update * weight >= 0) * decay)
        elif decay:
            weight.mul_(1 - decay)
        weight.sub_(update, alpha=group["lr"])


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
