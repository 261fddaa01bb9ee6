"""Training that changes its own course: `auto_lr_reduction` and `early_stop`. Pure functions of losses and norms.

Their fields are plain values: a checkpoint holds them, so that a resumed run decides as an unbroken one.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field


@dataclass
class SpikeGuard:
    """Halves the learning rate after a spike of the loss or of the gradient's norm.

    A loss is a spike when it is above the mean of the last WINDOW by three standard deviations and by LEAST_RISE; a
    norm, when it is above LARGEST_NORM times theirs. Nothing is judged before ENOUGH calm steps, counted anew after
    each reduction.
    """

    WINDOW = 100
    ENOUGH = 50
    LEAST_RISE = 0.5
    LARGEST_NORM = 10.0
    MOST_REDUCTIONS = 5

    factor: float = 1.0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def step(self, loss: float, norm: float) -> str | None:
        """Takes in a step; says what was a spike if the factor was halved because of it."""
        spike = self._spike(loss, norm) if len(self.losses) >= self.ENOUGH else None
        if spike is None:
            if math.isfinite(loss) and math.isfinite(norm):
                self.losses = [*self.losses, loss][-self.WINDOW :]
                self.norms = [*self.norms, norm][-self.WINDOW :]
            return None
        self.losses, self.norms = [], []
        if self.factor <= 0.5**self.MOST_REDUCTIONS:
            return None
        self.factor /= 2
        return spike

    def _spike(self, loss: float, norm: float) -> str | None:
        usual, size = statistics.fmean(self.losses), statistics.fmean(self.norms)
        rise = max(3 * statistics.pstdev(self.losses), self.LEAST_RISE)
        if not loss <= usual + rise:
            return f"a loss of {loss:.4g} after {usual:.4g} on average"
        if not norm <= self.LARGEST_NORM * size:
            return f"a gradient of norm {norm:.4g} after {size:.4g} on average"
        return None


@dataclass
class EarlyStop:
    """Ends a run whose loss no longer falls.

    A loss is better when it is below the best by the fraction MARGIN. The loss of training is the mean over the last
    SMOOTH steps.
    """

    SMOOTH = 20
    MARGIN = 1e-3
    PATIENCE_EVALUATIONS = 5
    PATIENCE_STEPS = 500
    DIVERGED = 1.5
    PATIENCE_DIVERGED = 200

    recent: list[float] = field(default_factory=list)
    best: float = math.inf
    steps_since: int = 0
    steps_diverged: int = 0
    best_evaluation: float = math.inf
    evaluations_since: int = 0

    def step(self, loss: float) -> None:
        """Takes in a training step."""
        self.recent = [*self.recent, loss][-self.SMOOTH :]
        if len(self.recent) < self.SMOOTH:
            return
        mean = statistics.fmean(self.recent)
        self.steps_diverged = 0 if mean <= self.DIVERGED * self.best else self.steps_diverged + 1
        better = mean < self.best * (1 - self.MARGIN)
        self.best, self.steps_since = (mean, 0) if better else (self.best, self.steps_since + 1)

    def evaluation(self, loss: float) -> None:
        """Takes in a loss on held-out data."""
        better = loss < self.best_evaluation * (1 - self.MARGIN)
        self.best_evaluation, self.evaluations_since = (
            (loss, 0) if better else (self.best_evaluation, self.evaluations_since + 1)
        )

    @property
    def reason(self) -> str | None:
        """Why to stop; None to go on."""
        if self.evaluations_since >= self.PATIENCE_EVALUATIONS:
            return f"no evaluation was better than {self.best_evaluation:.4g} in the last {self.evaluations_since}"
        if self.steps_diverged >= self.PATIENCE_DIVERGED:
            return f"the loss was above {self.DIVERGED} times {self.best:.4g} for {self.steps_diverged} steps"
        if self.steps_since >= self.PATIENCE_STEPS:
            return f"the loss did not fall below {self.best:.4g} for {self.steps_since} steps"
        return None


TOKENS_PER_WEIGHT = 20
"""Tokens to train on for each weight of a model, by the Chinchilla rule."""


def epochs_for(parameters: int, tokens: int) -> int:
    """Epochs over `tokens` in which a model of so many weights sees as many tokens as the rule asks for, ≥ 1."""
    return max(1, round(TOKENS_PER_WEIGHT * parameters / max(tokens, 1)))
