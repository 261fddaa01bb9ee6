"""AdamW over named weights: groups, one step, and its state by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from surogate.config.train import TrainConfig
from trainer_svc.worker.schedule import Schedule


@dataclass(frozen=True)
class StepOutcome:
    """What one optimiser step did. `applied` is false when the gradient was not finite and nothing was changed."""

    grad_norm: float
    learning_rate: float
    applied: bool


class Optimizer:
    """AdamW with clipping and a schedule. Weight decay acts on weights of two dimensions or more."""

    def __init__(self, weights: Mapping[str, torch.nn.Parameter], train: TrainConfig, schedule: Schedule) -> None:
        self._names = {id(weight): name for name, weight in weights.items()}
        self._weights = dict(weights)
        self._schedule = schedule
        self._peak = float(train.learning_rate)
        self._max_norm = float(train.max_grad_norm)
        matrices = [weight for weight in weights.values() if weight.dim() >= 2]
        others = [weight for weight in weights.values() if weight.dim() < 2]
        self._adamw = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=self._peak,
            betas=(train.adamw_beta1, train.adamw_beta2),
            eps=train.adamw_epsilon,
            foreach=True,
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        return self._peak * self._schedule.factor(step)

    def step(self, step: int) -> StepOutcome:
        """Clips the gradients, makes optimiser step `step` (from 0) with them, and clears them.

        A gradient that is not finite is thrown away: weights and moments stay as they were.
        """
        rate = self.learning_rate(step)
        gradients = [weight.grad for weight in self._weights.values() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        grad_norm = float(norm)
        applied = math.isfinite(grad_norm)
        if applied:
            if self._max_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(list(self._weights.values()), self._max_norm, norm, foreach=True)
            for group in self._adamw.param_groups:
                group["lr"] = rate
            self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return StepOutcome(grad_norm, rate, applied)

    def discard(self) -> None:
        """Throws gradients away."""
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        """Moments and step counts, as `<weight>|<field>`."""
        found = {}
        for weight, fields in self._adamw.state.items():
            for field, value in fields.items():
                found[f"{self._names[id(weight)]}|{field}"] = value.detach().clone()
        return found

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Undoes what happened since `state()`. Raises KeyError for a weight that is not trained here."""
        self._adamw.state.clear()
        for key, value in state.items():
            name, field = key.rsplit("|", 1)
            weight = self._weights[name]
            kept = value.clone() if field == "step" else value.to(weight.device).clone()
            self._adamw.state[weight][field] = kept
