"""The last table: what was trained, how it went, where it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from rich.console import Console
from rich.table import Table
from rich.text import Text

from surogate.cli import units
from surogate.cli.console import standard_output
from surogate.cli.running.progress import PHASES, VALIDATION, Progress
from surogate.client.jobs import kind_name, state_name, train_keys
from surogate.telemetry import metrics as names
from surogate.v1 import job_pb2
from surogate.visible import visible

_MAX_SAMPLES = 5
_FILES = (
    "metrics.jsonl",
    "plots/reward.png",
    "plots/loss.png",
    "adapter_model.safetensors",
    "model.safetensors",
    "merged",
    "logs",
)
_SERVE_AT = "127.0.0.1:50052"


def print_summary(job: job_pb2.Job, progress: Progress, *, local: bool, console: Console | None = None) -> None:
    """Prints the table of an ended job; `local` says that its folder is on this machine."""
    console = console or standard_output()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _rows(job, progress, local):
        table.add_row(key, Text(visible(value)))
    console.print()
    console.print(table)
    samples = _samples_table(progress)
    if samples is not None:
        console.print(samples)


def _rows(job: job_pb2.Job, progress: Progress, local: bool) -> Iterator[tuple[str, str]]:
    yield "job", f"{job.name} ({kind_name(job.kind)}): {state_name(job.state)}"
    yield "model", _trained(job)
    took = job.end_time.ToMicroseconds() - job.start_time.ToMicroseconds()
    steps = f"{job.step}" + (f" of {job.max_steps}" if job.max_steps else "")
    if job.HasField("start_time") and job.HasField("end_time"):
        steps += f" in {units.seconds(took / 1e6)}"
    yield "steps", steps
    yield from _outcomes(progress)
    yield from _times(progress)
    yield "output", job.output_dir
    if job.checkpoint and Path(job.checkpoint) != Path(job.output_dir):
        yield "checkpoint", job.checkpoint
    if local:
        for name in _FILES:
            if (file := Path(job.output_dir) / name).exists():
                yield "", str(file)
        yield from _next(job)


def _next(job: job_pb2.Job) -> Iterator[tuple[str, str]]:
    """What to do with what is there now."""
    if job.state == job_pb2.Job.STATE_CANCELLED and job.checkpoint:
        yield "go on", "the same command goes on from the checkpoint"
    if job.state != job_pb2.Job.STATE_SUCCEEDED:
        return
    model = Path(job.output_dir)
    if (model / "adapter_model.safetensors").exists():
        merged = model / "merged"
        if not merged.is_dir():
            yield "merge it", f"surogate merge --adapter {quote(str(model))} --output {quote(str(merged))}"
        model = merged
    yield "talk to it", f"surogate serve inference --model {quote(str(model))} --listen {_SERVE_AT}"
    raw = ' --raw "How it begins"' if job.kind == job_pb2.Job.KIND_PT else ""
    yield "", f"surogate generate --server {_SERVE_AT}{raw}"


def _trained(job: job_pb2.Job) -> str:
    train = train_keys(job)
    how = "LoRA adapter" if train.get("lora") else "all weights"
    return f"{train.get('model', '?')} ({how})"


def _outcomes(progress: Progress) -> Iterator[tuple[str, str]]:
    for environment, evaluations in progress.evaluations.items():
        first, last = evaluations[0], evaluations[-1]
        name = names.LOSS if environment == VALIDATION else names.REWARD_MEAN
        before, after = _value(first, name), _value(last, name)
        if before is None or after is None:
            continue
        what = "validation loss" if environment == VALIDATION else f"held-out reward, {environment}"
        if first.step == last.step:
            yield what, f"{after:.3f} ({_when(last.step)})"
        else:
            yield what, f"{before:.3f} → {after:.3f} ({after - before:+.3f}; {_when(first.step)} → {_when(last.step)})"
    for label, name in (("training reward", names.REWARD_MEAN), ("training loss", names.LOSS)):
        if name in progress.metrics and not (name == names.LOSS and names.REWARD_MEAN in progress.metrics):
            yield label, f"{progress.first_metrics[name]:.3f} → {progress.metrics[name]:.3f} (first → last step)"


def _value(evaluation: job_pb2.EvaluationCompleted, name: str) -> float | None:
    """The metric by its name, or by its name with a prefix such as `eval/`."""
    for key in sorted(evaluation.metrics, key=len):
        if key == name or key.endswith((f"/{name}", f"_{name}")):
            return evaluation.metrics[key]
    return None


def _when(step: int) -> str:
    return f"step {step}" if step else "before"


def _times(progress: Progress) -> Iterator[tuple[str, str]]:
    whole = progress.phases.get("step")
    if whole is not None and whole.value > 0:
        shares = [
            f"{phase} {units.seconds(mean.value)} ({mean.value / whole.value:.0%})"
            for phase in PHASES
            if (mean := progress.phases.get(phase)) is not None
        ]
        yield "time per step", f"{units.seconds(whole.value)}" + (f": {', '.join(shares)}" if shares else "")
    if names.TOKENS_PER_SECOND in progress.metrics:
        yield "tokens/s", units.count(progress.metrics[names.TOKENS_PER_SECOND])
    if progress.pushes:
        yield (
            "weight push",
            f"{progress.push_seconds.value * 1000:.0f} ms and {progress.push_bytes:,} bytes to each replica, "
            f"generation paused {progress.push_pause.value * 1000:.0f} ms (mean of {progress.pushes})",
        )


def _samples_table(progress: Progress) -> Table | None:
    """Completions of the same prompts at the first and the last step that showed any, side by side."""
    if not progress.samples:
        return None
    first, last = min(progress.samples), max(progress.samples)
    before = {(item.environment, item.prompt): item for item in reversed(progress.samples[first])}
    after = {(item.environment, item.prompt): item for item in reversed(progress.samples[last])}
    shared = [key for key in reversed(after) if key in before][:_MAX_SAMPLES]
    table = Table(title="samples", title_justify="left")
    for column in ("prompt", "answer", _when(first), "reward", _when(last), "reward"):
        table.add_column(column, overflow="fold")
    if not shared or first == last:
        return None
    for key in shared:
        old, new = before[key], after[key]
        cells = [old.prompt, new.answer, old.completion, f"{old.reward:.2f}", new.completion, f"{new.reward:.2f}"]
        table.add_row(*(Text(units.one_line(cell, 200)) for cell in cells))
    return table
