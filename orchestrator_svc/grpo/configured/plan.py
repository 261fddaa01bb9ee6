"""What the loop needs to know of a job's configuration, in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator_svc.grpo.configured.advantage import Advantage, advantages
from orchestrator_svc.grpo.configured.difficulty import Difficulty
from orchestrator_svc.grpo.configured.filters import Filter
from orchestrator_svc.grpo.configured.sampling import Sampling


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
    advantage: Advantage = field(default=advantages)
    """Advantages (G,) of rewards (G,) and completion lengths (G,)."""
    needs_signal: bool = True
    """Whether groups of equal rewards are left out: they have no advantages, unless those are the user's own."""
    drop_extremes: bool = False
    """Whether groups whose mean reward is 0 or 1 are left out."""
    ask_rewards: bool = True
    """Whether rollouts are scored; otherwise all rewards are 0."""
    filters: Sequence[Filter] = ()
    vocabulary: int = 1
    """Tokens that the model knows, as its replicas say."""
    difficulty: Difficulty = field(default_factory=Difficulty)
    """When prompts are laid aside."""
    draw_once: bool = False
    """Whether no prompt is drawn twice."""
    ratios: Mapping[str, float] | None = None
    """Shares of environments in the prompts, by key; None is by the number of their prompts."""
    hash_keys: Sequence[str] = ("task", "prompt")
    """What tells an example from others when a job goes on from a checkpoint."""
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
    def min_group(self) -> int:
        """Rollouts that a group needs: one alone has nothing to be compared with."""
        return 2 if self.needs_signal else 1

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
