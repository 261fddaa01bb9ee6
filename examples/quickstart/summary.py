"""What came of a quickstart: the numbers of this run, for the terminal, for programs and for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

REWARD = "reward/mean"
PARTS = ("generate", "score", "train", "push", "idle")
"""Phases of a step. Generation runs beside training, so that they add up to more than the step."""

SHOWN = 4
"""Prompts whose completions are shown."""

Line = Mapping[str, Any]


def write_summary(folder: Path, seconds: Mapping[str, float], seed: int) -> dict[str, Any]:
    """Writes summary.json and summary.md into `folder`, prints the same, and returns it."""
    summary = summarise(folder / "grpo", seconds, seed)
    samples = side_by_side(read_lines(folder / "grpo" / "samples.jsonl"))
    (folder / "summary.json").write_text(json.dumps({**summary, "samples": samples}, indent=2) + "\n", encoding="utf-8")
    rows, plot = table_rows(summary), folder / "grpo" / "plots" / "reward.png"
    (folder / "summary.md").write_text(as_markdown(rows, samples, plot.relative_to(folder)), encoding="utf-8")
    show(rows, samples, Console())
    print(f"\nplot of the reward  {plot}\nmetrics by step     {folder / 'grpo' / 'metrics.jsonl'}")
    print(f"this summary        {folder / 'summary.md'}, {folder / 'summary.json'}")
    return summary


def summarise(grpo: Path, seconds: Mapping[str, float], seed: int) -> dict[str, Any]:
    """The numbers of a run, from the files of its GRPO job and the seconds of each phase of the quickstart."""
    steps, evaluations = read_lines(grpo / "metrics.jsonl"), read_lines(grpo / "evaluations.jsonl")
    first, last = evaluations[0], evaluations[-1]
    return {
        "seed": seed,
        "held_out_reward": {
            "before": first[REWARD],
            "after": last[REWARD],
            "gain": last[REWARD] - first[REWARD],
            "exact_before": first.get("reward/exact"),
            "exact_after": last.get("reward/exact"),
            "prompts": int(last["num_prompts"]),
        },
        "steps": len(steps),
        "seconds_per_step": _mean(steps, "time/step"),
        "phase_seconds_per_step": {part: _mean(steps, f"time/{part}") for part in PARTS},
        "push": {
            "milliseconds": 1000 * _mean(steps, "time/push"),
            "pause_milliseconds": 1000 * _mean(steps, "push/pause"),
            "bytes": int(max((step.get("push/bytes", 0) for step in steps), default=0)),
        },
        "minutes": {
            **{phase: time / 60 for phase, time in seconds.items() if phase != "begin"},
            "total": sum(seconds.values()) / 60,
        },
    }


def side_by_side(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Completions of the same held-out prompts before the first step and after the last."""
    if not lines:
        return []
    first, last = lines[0]["step"], lines[-1]["step"]
    before = {line["prompt"]: line for line in lines if line["step"] == first}
    after = {line["prompt"]: line for line in lines if line["step"] == last}
    return [
        {
            "prompt": prompt,
            "answer": line["answer"],
            "before": before[prompt]["completion"],
            "reward_before": before[prompt]["reward"],
            "after": line["completion"],
            "reward_after": line["reward"],
        }
        for prompt, line in list(after.items())[:SHOWN]
        if prompt in before
    ]


def table_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary in words."""
    reward, push, minutes = summary["held_out_reward"], summary["push"], summary["minutes"]
    parts = ", ".join(f"{part} {time:.2f} s" for part, time in summary["phase_seconds_per_step"].items())
    spent = ", ".join(f"{phase} {time:.1f}" for phase, time in minutes.items() if phase != "total")
    return [
        (
            f"held-out mean reward, {reward['prompts']} prompts",
            f"{reward['before']:.3f} → {reward['after']:.3f} ({reward['gain']:+.3f})",
        ),
        ("held-out, all right", f"{reward['exact_before'] or 0:.1%} → {reward['exact_after'] or 0:.1%}"),
        ("GRPO steps", f"{summary['steps']}, {summary['seconds_per_step']:.2f} s each: {parts}"),
        (
            "weight push",
            f"{push['milliseconds']:.0f} ms and {push['bytes']:,} bytes a step, "
            f"generation paused {push['pause_milliseconds']:.0f} ms",
        ),
        ("minutes", f"{minutes['total']:.1f}: {spent}"),
        ("seed", str(summary["seed"])),
    ]


def show(rows: Sequence[tuple[str, str]], samples: Sequence[Line], console: Console) -> None:
    """Prints both tables."""
    numbers = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in rows:
        numbers.add_row(Text(key, style="bold"), Text(value))
    console.print("\n", Text("quickstart", style="bold"), sep="")
    console.print(numbers)
    if samples:
        table = Table(box=box.SIMPLE)
        for heading in HEADINGS:
            table.add_column(heading, overflow="fold")
        for sample in samples:
            table.add_row(*(Text(cell) for cell in _cells(sample)))
        console.print(table)


HEADINGS = ("held-out prompt", "answer", "before", "reward", "after", "reward")


def as_markdown(rows: Sequence[tuple[str, str]], samples: Sequence[Line], plot: Path) -> str:
    """The same as a page, with the plot in it."""
    lines = ["# Quickstart", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows), ""]
    if samples:
        lines += [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
        lines += ["| " + " | ".join(_escaped(cell) for cell in _cells(sample)) + " |" for sample in samples] + [""]
    return "\n".join([*lines, f"![reward by step]({plot})", ""])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _cells(sample: Line) -> list[str]:
    before, after = f"{sample['reward_before']:.2f}", f"{sample['reward_after']:.2f}"
    return [sample["prompt"], sample["answer"], sample["before"], before, sample["after"], after]


def _escaped(cell: str) -> str:
    """A cell of a Markdown table: what a model writes may hold anything."""
    return "`" + " ".join(cell.split()).replace("|", "\\|").replace("`", "'") + "`"


def _mean(lines: Sequence[Line], name: str) -> float:
    return fmean([line[name] for line in lines if name in line] or [0.0])
