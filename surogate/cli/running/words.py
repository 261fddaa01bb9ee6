"""What events and steps are in words, the same for the live and the plain display."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from surogate.cli import units
from surogate.cli.running.progress import PHASES, Progress
from surogate.telemetry import metrics as names
from surogate.v1 import job_pb2
from surogate.visible import visible

_SEVERITY = {
    job_pb2.Notice.SEVERITY_WARNING: "warning: ",
    job_pb2.Notice.SEVERITY_ERROR: "error: ",
}


def step_parts(progress: Progress) -> list[str]:
    """The newest metrics, the most telling first: `reward 0.61`, `loss 0.0123`, …"""
    values = progress.metrics
    shown: dict[str, Callable[[float], str]] = {
        names.REWARD_MEAN: lambda value: f"reward {value:.3f}",
        names.LOSS: lambda value: f"loss {value:.4g}",
        names.MASKED_FRACTION: lambda value: f"masked {units.percent(value)}",
        names.GRAD_NORM: lambda value: f"grad norm {value:.3g}",
        names.LEARNING_RATE: lambda value: f"lr {value:.2g}",
        names.TOKENS_PER_SECOND: lambda value: f"{units.count(value)} tokens/s",
    }
    return [words(values[name]) for name, words in shown.items() if name in values]


def phase_parts(values: Mapping[str, float]) -> list[str]:
    """Time of each phase of a step: `generate 0.80 s`, … Phases that took none are left out."""
    return [f"{phase} {units.seconds(values[name])}" for phase, name in PHASES.items() if values.get(name, 0) >= 5e-4]


def step_line(progress: Progress, *, replayed: bool = False) -> str:
    """One line for one step."""
    total = f"/{progress.max_steps}" if progress.max_steps else ""
    parts = [f"step {progress.step}{total}", *step_parts(progress)]
    if names.TIME_STEP in progress.metrics:
        phases = ", ".join(phase_parts(progress.metrics))
        parts.append(units.seconds(progress.metrics[names.TIME_STEP]) + (f" ({phases})" if phases else ""))
    if replayed:
        parts.append("trained again since the last checkpoint")
    elif progress.eta:
        parts.append(f"ETA {units.clock(progress.eta)}")
    return "  ".join(parts)


def notice(event: job_pb2.JobEvent) -> str | None:
    """An event that is not a step, in words; None for those that are shown elsewhere."""
    said = _said(event)
    return None if said is None else visible(said)


def _said(event: job_pb2.JobEvent) -> str | None:
    kind = event.WhichOneof("event")
    if kind == "state_changed":
        return f"{job_pb2.Job.State.Name(event.state_changed.state)[6:].lower()}: {event.state_changed.status_message}"
    if kind == "checkpoint_saved":
        saved = event.checkpoint_saved
        return f"{'final model' if saved.final else f'checkpoint at step {saved.step}'}: {saved.path}"
    if kind == "evaluation_completed":
        return evaluation(event.evaluation_completed)
    if kind == "notice":
        component = f"[{event.notice.component}] " if event.notice.component else ""
        return f"{_SEVERITY.get(event.notice.severity, '')}{component}{event.notice.text}"
    return None


def evaluation(done: job_pb2.EvaluationCompleted) -> str:
    """`evaluation before training, reverse-text: reward/mean 0.55`."""
    when = f"after step {done.step}" if done.step else "before training"
    values = ", ".join(f"{name} {value:.4g}" for name, value in sorted(done.metrics.items()))
    return f"evaluation {when}, {done.environment}: {values}"
