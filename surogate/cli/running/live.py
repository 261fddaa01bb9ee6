"""The live display: a step bar with the newest metrics, notices above it."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from surogate.cli import units
from surogate.cli.running import words
from surogate.cli.running.display import Display
from surogate.cli.running.progress import Progress
from surogate.telemetry import metrics as names
from surogate.v1 import job_pb2
from surogate.visible import visible

_STYLES = {job_pb2.Notice.SEVERITY_WARNING: "yellow", job_pb2.Notice.SEVERITY_ERROR: "red"}


class LiveDisplay(Display):
    """Draws the bar anew on each event, and four times a second for the spinner."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._spinner = Spinner("dots")
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._live.start()

    def show(self, event: job_pb2.JobEvent, progress: Progress) -> None:
        """Takes the event into the bar, or prints its line above."""
        # The state is in the line beside the spinner.
        if not (event.HasField("step_completed") or event.HasField("state_changed")):
            self._above(event)
        self._live.update(self._render(progress))

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(Text(text, style="bold"))

    def close(self) -> None:
        """Takes the bar away."""
        self._live.stop()

    def _above(self, event: job_pb2.JobEvent) -> None:
        if line := words.notice(event):
            style = _STYLES.get(event.notice.severity, "") if event.HasField("notice") else "dim"
            self._console.print(Text(line, style=style))

    def _render(self, progress: Progress) -> RenderableType:
        status = ": ".join(part for part in (progress.state, progress.status_message) if part)
        self._spinner.update(text=Text(f" {visible(status)}"))
        if not progress.step:
            return self._spinner
        lines: list[RenderableType] = [_bar(progress), Text("  ".join(_metric_parts(progress)), style="cyan")]
        phases = words.phase_parts(progress.metrics)
        if phases:
            step = progress.metrics.get(names.TIME_STEP)
            total = f"step {units.seconds(step)}: " if step is not None else ""
            lines.append(Text(total + "  ".join(phases), style="dim"))
        return Group(*lines, self._spinner)


def _bar(progress: Progress) -> RenderableType:
    row = Table.grid(padding=(0, 1), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    total = progress.max_steps
    eta = f"ETA {units.clock(progress.eta)}" if progress.eta is not None else ""
    row.add_row(
        f"step {progress.step}" + (f"/{total}" if total else ""),
        ProgressBar(total=total or None, completed=progress.step, pulse=not total),
        eta,
    )
    return row


def _metric_parts(progress: Progress) -> list[str]:
    parts = words.step_parts(progress)
    first = progress.first_metrics.get(names.REWARD_MEAN)
    if first is not None and parts:
        parts[0] += f" (at first {first:.3f})"
    return parts
