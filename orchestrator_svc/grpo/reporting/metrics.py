"""Metrics of a step, from its groups and its clocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from orchestrator_svc.grpo.batch import Batch
from orchestrator_svc.grpo.groups import Cause, Group, Rollout
from orchestrator_svc.grpo.rollouts.metrics import rollout_metrics
from surogate.telemetry import metrics as names

_OTHERS = (
    Cause.STALE,
    Cause.REWARD,
    Cause.GENERATION,
    Cause.ENVIRONMENT,
    Cause.JUDGE,
    Cause.FILTERED,
    Cause.SURPLUS,
)
"""Causes whose counts are metrics where there are any."""


def batch_metrics(batch: Batch) -> dict[str, float]:
    """What the rollouts of a step say. Rewards and lengths count groups without signal too: leaving those out would
    make a policy that always succeeds look like one that never does."""
    kept = batch.groups + [drop.group for drop in batch.dropped if drop.cause is Cause.ZERO_SIGNAL and drop.group]
    rollouts = _rollouts(kept)
    causes = batch.causes
    lags = [batch.step - 1 - group.oldest_version for group in batch.groups]
    values = rollout_metrics(rollouts) | {
        names.GROUPS_ZERO_SIGNAL: float(causes[Cause.ZERO_SIGNAL]),
        names.POLICY_LAG: float(np.mean(lags)),
        names.POLICY_LAG_MAX: float(max(lags)),
        names.GROUPS_TRAINED: float(len(batch.groups)),
        names.TEMPERATURE: batch.temperature,
        names.TIME_GENERATE: batch.generating.seconds,
        names.TIME_SCORE: batch.scoring.seconds,
    }
    values |= {f"groups/{cause}": float(causes[cause]) for cause in _OTHERS if causes[cause]}
    values |= {f"filter/{name}": count / batch.generated for name, count in batch.filtered.items()}
    return values | _by_environment(kept)


def _by_environment(groups: Sequence[Group]) -> dict[str, float]:
    """`env/<environment>/<name>`: what the rollouts of each environment say, where there are several."""
    of: defaultdict[str, list[Group]] = defaultdict(list)
    for group in groups:
        of[group.draw.prompt.environment].append(group)
    if len(of) < 2:
        return {}
    return {
        f"env/{key}/{name}": value
        for key, own in sorted(of.items())
        for name, value in {**rollout_metrics(_rollouts(own)), "groups": float(len(own))}.items()
    }


def _rollouts(groups: Iterable[Group]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def trained_tokens(groups: Iterable[Group]) -> int:
    """Tokens of the groups that the model made."""
    return sum(rollout.num_sampled for group in groups for rollout in group.rollouts)


def step_clock(*, waited: float, trained: float, pushed: float, total: float, tokens: float) -> Mapping[str, float]:
    """The times of a step, in seconds, and its tokens per second. The trainer is idle while it waits for rollouts."""
    return {
        names.TIME_IDLE: waited,
        names.TIME_TRAIN: trained,
        names.TIME_PUSH: pushed,
        names.TIME_STEP: total,
        names.TOKENS_PER_SECOND: tokens / total if total > 0 else 0.0,
    }
