"""What `surogate env eval` found: statistics of rewards, and samples, for people and as JSON."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from surogate.cli import units
from surogate.cli.console import standard_output
from surogate.v1 import common_pb2, reward_pb2
from surogate.visible import visible

_BINS = 10
_BAR = 40
"""Characters of the longest bar."""


@dataclass
class Group:
    """A prompt, its completions, and what they earned."""

    number: str
    """Unique in the evaluation."""
    example: reward_pb2.Example
    rollouts: list[reward_pb2.Rollout] = field(default_factory=list)
    scores: dict[str, reward_pb2.Score] = field(default_factory=dict)
    """By rollout id."""
    errors: list[str] = field(default_factory=list)


def summary(groups: Sequence[Group], samples: int) -> dict[str, Any]:
    """Statistics over all rollouts of all groups. `signal` is the share of groups whose rewards are not all equal."""
    scores = [score for group in groups for score in group.scores.values()]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = np.array([score.reward for score in scores], np.float64)
    errors = collections.Counter(error for group in groups for error in group.errors)
    truncated = sum(rollout.finish_reason == common_pb2.FINISH_REASON_LENGTH for rollout in rollouts)
    found: dict[str, Any] = {
        "examples": len(groups),
        "rollouts": len(rollouts),
        "scored": len(scores),
        "failed": sum(errors.values()),
        "errors": dict(errors.most_common()),
        "truncated": truncated / len(rollouts),
        "samples": _samples(groups, samples),
        "mean_tokens": float(np.mean([rollout.num_tokens for rollout in rollouts])),
    }
    if not scores:
        return found
    counts, edges = np.histogram(rewards, bins=_BINS)
    found |= {
        "mean": float(rewards.mean()),
        "std": float(rewards.std()),
        "min": float(rewards.min()),
        "max": float(rewards.max()),
        "signal": sum(len({score.reward for score in group.scores.values()}) > 1 for group in groups) / len(groups),
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        "components": _components(scores),
    }
    return found


def _components(scores: Sequence[reward_pb2.Score]) -> dict[str, float]:
    values: dict[str, list[float]] = collections.defaultdict(list)
    for score in scores:
        for name, value in score.components.items():
            values[name].append(value)
    return {name: float(np.mean(found)) for name, found in sorted(values.items())}


def _samples(groups: Sequence[Group], count: int) -> list[dict[str, Any]]:
    """The worst, the best, and what lies between, at equal distances."""
    scored = [
        (group.scores[rollout.rollout_id], group, rollout)
        for group in groups
        for rollout in group.rollouts
        if rollout.rollout_id in group.scores
    ]
    scored.sort(key=lambda item: (item[0].reward, item[2].rollout_id))
    places = np.linspace(0, len(scored) - 1, min(count, len(scored))).round().astype(int)
    return [
        {
            "prompt": group.example.prompt[-1].content if group.example.prompt else "",
            "completion": rollout.completion,
            "answer": group.example.answer,
            "reward": score.reward,
            "explanation": score.explanation,
        }
        for score, group, rollout in (scored[place] for place in places)
    ]


def show(title: str, found: Mapping[str, Any]) -> None:
    """Prints what `summary` found."""
    console = standard_output()
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(title, found):
        facts.add_row(Text(visible(name), style="bold"), Text(visible(value)))
    console.print(facts)
    if "histogram" in found:
        counts, edges = found["histogram"]["counts"], found["histogram"]["edges"]
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            console.print(f"{low:8.3g} … {high:<8.3g} {'█' * round(_BAR * count / max(counts))} {count}", markup=False)
    if found["samples"]:
        table = Table("reward", "prompt", "completion", "answer")
        for sample in found["samples"]:
            texts = (units.one_line(sample[name], 60) for name in ("prompt", "completion", "answer"))
            table.add_row(Text(f"{sample['reward']:.3f}"), *map(Text, texts))
        console.print(table)


def _facts(title: str, found: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("environment", title),
        ("rollouts", f"{found['rollouts']}: {found['scored']} scored, {found['failed']} errors"),
    ]
    facts += [("error", f"{count} × {units.one_line(error, 200)}") for error, count in found["errors"].items()]
    if "mean" in found:
        facts += [
            ("reward", f"{found['mean']:.4f} ± {found['std']:.4f}, from {found['min']:.4g} to {found['max']:.4g}"),
            ("signal", f"{units.percent(found['signal'])} of the prompts have rollouts of different rewards"),
        ]
        facts += [(f"component {name}", f"{value:.4f}") for name, value in found["components"].items()]
    length = f"{found['mean_tokens']:.1f} tokens, {units.percent(found['truncated'])} cut off"
    return [*facts, ("completions", length)]
