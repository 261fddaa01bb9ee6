"""Files of a GRPO job beside metrics.jsonl: evaluations.jsonl, samples.jsonl and the plot of the reward."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator_svc.jobs.plots import plot_lines
from surogate.telemetry import metrics as names
from surogate.v1 import job_pb2

Steps = Mapping[int, Mapping[str, float]]
Evaluations = Mapping[tuple[int, str], Mapping[str, float]]
"""Metrics by step and environment."""

_WEIGHT = 0.9  # of the past in the smoothed curve


def write_evaluations(path: Path, evaluations: Evaluations) -> None:
    """Writes a line `{"step", "environment", **metrics}` for each evaluation, all of them at once."""
    lines = [
        {"step": step, "environment": environment, **{k: v for k, v in values.items() if math.isfinite(v)}}
        for (step, environment), values in sorted(evaluations.items())
    ]
    _write_lines(path, lines)


def write_samples(path: Path, step: int, samples: Sequence[job_pb2.Sample]) -> None:
    """Adds a line `{"step", "environment", "prompt", "answer", "completion", "reward"}` for each completion that an
    evaluation shows; what the file has of that step and environment already is replaced."""
    shown = {(step, sample.environment) for sample in samples}
    before: list[dict[str, Any]] = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )
    lines: list[dict[str, Any]] = [line for line in before if (line["step"], line["environment"]) not in shown]
    lines += [
        {
            "step": step,
            "environment": sample.environment,
            "prompt": sample.prompt,
            "answer": sample.answer,
            "completion": sample.completion,
            "reward": sample.reward,
        }
        for sample in samples
    ]
    lines.sort(key=lambda line: int(line["step"]))
    _write_lines(path, lines)


def _write_lines(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    part.replace(path)


def plot_reward(path: Path, steps: Steps, evaluations: Evaluations) -> None:
    """Draws the mean training reward of every step, smoothed, and the held-out mean of every evaluation, as a PNG."""
    rewards = [
        (step, values[names.REWARD_MEAN]) for step, values in sorted(steps.items()) if names.REWARD_MEAN in values
    ]
    curves = {"training": rewards, "training, smoothed": _smooth(rewards)}
    for environment in sorted({environment for _, environment in evaluations}):
        curves[f"held out: {environment}"] = [
            (step, values[names.REWARD_MEAN]) for (step, of), values in sorted(evaluations.items()) if of == environment
        ]
    plot_lines(path, curves, title="Reward", ylabel="mean reward")


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential moving average, without the bias towards the first value."""
    smooth, total, mass = [], 0.0, 0.0
    for step, value in points:
        total = _WEIGHT * total + (1 - _WEIGHT) * value
        mass = _WEIGHT * mass + (1 - _WEIGHT)
        smooth.append((step, total / mass))
    return smooth
