"""The optimiser over named weights: clipping, a schedule, one step, and its state by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from surogate.config.train import TrainConfig
from trainer_svc.worker.optim.blockwise import OverShares, begins_with_blocks, joined
from trainer_svc.worker.optim.narrow import is_narrow, keep_gradients, total_norm, widened
from trainer_svc.worker.optim.optimizer_kinds import local, make_optimizers, restored, saved, takes_scale
from trainer_svc.worker.optim.schedule import Schedule
from trainer_svc.worker.ranks import Ranks
from trainer_svc.worker.shares import whole


@dataclass(frozen=True)
class StepOutcome:
    """What one optimiser step did. `applied` is false when the gradient was not finite and nothing was changed."""

    grad_norm: float
    learning_rate: float
    applied: bool


class Optimizer:
    """What `optimizer` names, with clipping and a schedule. `apart`: names of embeddings and heads among the weights.

    With `offload_optimizer` the state of a weight is on its device only while that weight is updated. `scale` is what
    the schedule's learning rate is multiplied by.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.nn.Parameter],
        train: TrainConfig,
        schedule: Schedule,
        apart: Iterable[str] = (),
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        self._weights = dict(weights)
        self._schedule = schedule
        self._peak = float(train.learning_rate)
        self._max_norm = float(train.max_grad_norm)
        self._offload = train.offload_optimizer
        self._narrow = is_narrow(train)
        self.scale = 1.0
        keep_gradients(self._weights.values(), train)
        apart = frozenset(apart)
        # Weights are independent of each other, so that an optimiser for each does what one for all would do.
        one_by_one = self._offload or self._narrow
        shares = [{name: weight} for name, weight in weights.items()] if one_by_one else [self._weights]
        zero = self._ranks.world_size > 1 and train.zero_level == 1
        self._parts = [part for share in shares for part in make_optimizers(share, train, apart, zero=zero)]
        self._decides_on_device = not one_by_one and not zero and all(map(takes_scale, self._parts))
        self._owner = {id(w): part for part in self._parts for group in part.param_groups for w in group["params"]}

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        return self._peak * self._schedule.factor(step) * self.scale

    def step(self, step: int) -> StepOutcome:
        """Clips the gradients, makes optimiser step `step` (from 0) with them, and clears them.

        A gradient that is not finite is thrown away: weights and moments stay as they were.
        """
        rate = self.learning_rate(step)
        gradients = [weight.grad for weight in self._weights.values() if weight.grad is not None]
        norm = total_norm(gradients) if self._narrow else torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self._decides_on_device:
            self._step_if_finite(norm, rate)
            self.discard()
            found = float(norm)
            return StepOutcome(found, rate, math.isfinite(found))
        grad_norm = float(whole(norm))
        applied = math.isfinite(grad_norm)
        if applied:
            if self._max_norm > 0 and not self._narrow:
                torch.nn.utils.clip_grads_with_norm_(list(self._weights.values()), self._max_norm, norm, foreach=True)
            for part in self._parts:
                for group in part.param_groups:
                    group["lr"] = rate
                if self._narrow:
                    with widened((w for group in part.param_groups for w in group["params"]), self._clipping(norm)):
                        self._step(part)
                else:
                    self._step(part)
        self.discard()
        return StepOutcome(grad_norm, rate, applied)

    def _step_if_finite(self, norm: torch.Tensor, rate: float) -> None:
        """The same without waiting for the norm (0-d): the kernel divides by a scale, and does nothing where it is told
        of infinities, which is torch's protocol for scaled losses.
        """
        for part in self._parts:
            fused: Any = part
            fused.grad_scale = 1 / self._clipping(norm) if self._max_norm > 0 else None
            fused.found_inf = (~norm.isfinite()).float()
            for group in part.param_groups:
                group["lr"] = rate
            part.step()

    def _clipping(self, norm: torch.Tensor) -> torch.Tensor:
        """What gradients of that norm are multiplied by, 0-d."""
        return (self._max_norm / (norm + 1e-6)).clamp(max=1.0) if self._max_norm > 0 else torch.ones_like(norm)

    def discard(self) -> None:
        """Throws gradients away."""
        for weight in self._weights.values():
            weight.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Moments and step counts, as `<weight>|<field>`, on rank 0; nothing on others, which must ask all the same."""
        found: dict[str, torch.Tensor] = {}
        for name, weight in self._weights.items():
            whole_state = self._state_of(weight)
            if self._ranks.first:
                found |= {f"{name}|{field}": value for field, value in whole_state.items()}
        return found

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Undoes what happened since `state()`. Raises KeyError for a weight that is not trained here."""
        fields: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self._weights}
        for key, value in state.items():
            name, field = key.rsplit("|", 1)
            fields[name][field] = value
        for part in self._parts:
            local(part).state.clear()
        for name, found in fields.items():
            if found:
                weight = self._weights[name]
                part = local(self._owner[id(weight)])
                if not any(weight is own for group in part.param_groups for own in group["params"]):
                    continue  # another rank's
                part.state[weight] = restored(part, weight, found)
                if self._offload:
                    _move_state(part, torch.device("cpu"))

    def _state_of(self, weight: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """One weight's state in one piece, on the host if it was on several ranks."""
        part = self._owner[id(weight)]
        own = dict(saved(local(part).state.get(weight, {})))
        if self._ranks.world_size == 1:
            return own
        if isinstance(part, OverShares):
            assert isinstance(weight, DTensor)
            own = {field: value.cpu() for field, value in own.items()}
            everybodys = self._ranks.gather_at_first(own) if begins_with_blocks(weight) else [own]
            return joined(everybodys) if self._ranks.first else {}
        if local(part) is part:  # every rank has a share of each tensor
            return {field: whole(value).cpu() for field, value in own.items()}
        everybodys = self._ranks.gather_at_first({field: value.cpu() for field, value in own.items()})
        return next((state for state in everybodys if state), {})

    def _step(self, part: torch.optim.Optimizer) -> None:
        if not self._offload:
            part.step()
            return
        for weight in part.state:
            _move_state(part, weight.device)
        part.step()
        _move_state(part, torch.device("cpu"))


def _move_state(part: torch.optim.Optimizer, device: torch.device) -> None:
    """Moves moments between a weight's device and the host's memory. Step counts stay where torch put them."""
    for state in part.state.values():
        for field, value in state.items():
            if isinstance(value, torch.Tensor) and field != "step":
                state[field] = value.to(device)
