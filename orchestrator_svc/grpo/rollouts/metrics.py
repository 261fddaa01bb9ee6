"""What scored rollouts say, in training and in evaluation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from orchestrator_svc.grpo.groups import Rollout
from surogate.telemetry import metrics as names


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over scored rollouts: reward, its named parts (`reward/<part>`), length, truncation, turns of episodes."""
    rewards = np.array([rollout.reward for rollout in rollouts], np.float64)
    values = {
        names.REWARD_MEAN: float(rewards.mean()),
        names.REWARD_STD: float(rewards.std()),
        names.COMPLETION_LENGTH: float(np.mean([rollout.num_sampled for rollout in rollouts])),
        names.COMPLETION_TRUNCATED_FRACTION: float(np.mean([rollout.truncated for rollout in rollouts])),
    }
    if any(rollout.messages for rollout in rollouts):
        values[names.EPISODE_TURNS] = float(np.mean([rollout.turns for rollout in rollouts]))
        values["episode/turns_max"] = float(max(rollout.turns for rollout in rollouts))
    return values | _components(rollouts)


def _components(rollouts: Sequence[Rollout]) -> dict[str, float]:
    parts: defaultdict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        for name, value in rollout.components.items():
            parts[name].append(value)
    # A part may not take the name of a metric of ours.
    taken = {names.REWARD_MEAN, names.REWARD_STD}
    return {f"reward/{name}": float(np.mean(part)) for name, part in parts.items() if f"reward/{name}" not in taken}
