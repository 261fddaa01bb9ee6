"""What the loop needs to know of a job's configuration, in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from orchestrator_svc.grpo.sampling import Sampling


@dataclass(frozen=True)
class Plan:
    """The numbers of a GRPO job."""

    max_steps: int
    groups_per_step: int
    rollouts_per_example: int
    context: int
    """Longest prompt plus completion, in tokens."""
    sampling: Sampling
    max_async_level: int = 1
    """Steps that generation may run ahead of training; 0 is strictly on-policy."""
    max_off_policy_steps: int = 8
    """Rollouts whose oldest token is from a policy further behind are dropped."""
    oversampling_factor: float = 1.0
    """Groups started for a step, as a multiple of those that it trains on."""
    refill_rounds: int = 4
    """Prompts drawn in place of dropped ones, at most, as a multiple of `groups_per_step`; 0 is off."""
    advantage: Literal["default", "std_normalized"] = "default"
    length_weighted_mean: bool = False
    checkpoint_interval: int = 0
    """Steps between checkpoints; 0 is none but the last."""
    evaluation_interval: int = 0
    """Steps between evaluations; 0 is no evaluation."""
    evaluate_base: bool = True
    """Whether to evaluate before the first step."""
    evaluate_origin: bool = False
    """Whether to evaluate the checkpoint that a new job goes on from, where its step is due."""
    restart_on_evaluation: bool = False
    """Whether rollouts in the making are given up for an evaluation, and made anew after it."""
    seed: int = 0

    @property
    def run_ahead(self) -> int:
        """Steps that generation runs ahead: no further than its rollouts could still be trained on."""
        return min(self.max_async_level, self.max_off_policy_steps)

    @property
    def groups_started(self) -> int:
        """Groups started for a step at once."""
        return math.ceil(self.groups_per_step * self.oversampling_factor)

    @property
    def refill_budget(self) -> int:
        """Prompts that may be drawn for a step in place of dropped ones."""
        return self.groups_per_step * self.refill_rounds

    def temperature(self, step: int) -> float:
        """Sampling temperature of a step; 0 is the model before training."""
        return self.sampling.schedule.at(max(step, 1), self.max_steps)
