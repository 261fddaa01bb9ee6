"""What a PT or SFT session reports, written down: the job's events, metrics.jsonl, the plot of the loss."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator_svc.jobs.context import WRITING_MODEL, JobContext
from orchestrator_svc.jobs.metrics_file import MetricsFile, read_metrics
from orchestrator_svc.jobs.plots import plot_lines
from orchestrator_svc.jobstore.journal import Happening
from surogate.telemetry import metrics as telemetry
from surogate.v1 import job_pb2, trainer_pb2

_VALIDATION = "validation"


CHEAP_SECONDS = 60.0
"""Training that is rather done again than left without metrics."""


@dataclass(frozen=True)
class Origin:
    """What CreateSession is told about where to begin."""

    checkpoint: str = ""
    fresh: bool = False


class SessionRecord:
    """Each step is in metrics.jsonl once; in the job's events a step that was trained again is marked `replayed`."""

    def __init__(self, ctx: JobContext) -> None:
        self._ctx = ctx
        self._metrics = MetricsFile(ctx.output_dir / "metrics.jsonl")
        self._evaluations = ctx.output_dir / "evaluations.jsonl"
        self._max_steps = 0
        self.step = ctx.step
        """Steps recorded as done, once or more often."""
        self._lost = ""

    @property
    def sequence(self) -> int:
        """Number of the last event of the current session that was written down."""
        return int(self._ctx.state.get("sequence", 0))

    def origin(self) -> Origin:
        """Where a new session begins. For a job that has not trained yet the configuration decides.

        Else it is the newest checkpoint that was reported, or the beginning where there was none. A trainer that lost
        its orchestrator has saved a later state; that one is taken if it spares more than `CHEAP_SECONDS` of
        training, at the price of a few steps without metrics.
        """
        state = self._ctx.state
        if "checkpoint" not in state:
            return Origin(fresh=not self._ctx.config.train.resume_from_checkpoint)
        checkpoint = str(state["checkpoint"])
        if checkpoint and checkpoint == self._lost:
            return Origin()
        cheap = self._metrics.seconds_since(int(state["checkpoint_step"])) <= CHEAP_SECONDS
        if cheap or self._ctx.config.train.resume_from_checkpoint is not True:
            return Origin(checkpoint, fresh=not checkpoint)
        return Origin()

    def lose(self, origin: Origin) -> bool:
        """Notes that the trainer has no good copy of a reported checkpoint: perhaps a newer one has replaced it.

        The next origin leaves the choice to the trainer. False if it was left to it already.
        """
        self._lost = origin.checkpoint
        return bool(origin.checkpoint)

    async def attach(self, session: trainer_pb2.Session) -> None:
        """Takes up a session where it was left, or from its beginning if it is another of the same name."""
        self._max_steps = session.max_steps
        # Its events are numbered anew when the trainer is another process, and when the session was made again there.
        identity = f"{session.incarnation}/{session.create_time.ToNanoseconds()}"
        if self._ctx.state.get("session") != identity:
            await self._ctx.update(state={**self._ctx.state, "session": identity, "sequence": 0})

    async def begin(self, session: trainer_pb2.Session) -> None:
        """A session is loaded: `session.step` steps are behind it, and those after them come (again)."""
        self._max_steps = session.max_steps
        await asyncio.to_thread(self._metrics.truncate, session.step)
        if not (self._ctx.resumed or self.step) and 0 < session.max_steps <= session.step:
            await self._tell_done(session)
        elif self._ctx.resumed or self.step or session.step:
            await self._tell_resume(session)
        self.step = max(self.step, session.step)
        begun = {"checkpoint": session.checkpoint, "checkpoint_step": session.checkpoint_step}
        await self._ctx.update(
            step=self.step,
            max_steps=session.max_steps,
            checkpoint=session.checkpoint or None,
            state={**self._ctx.state, **begun},
        )

    async def write(self, batch: list[trainer_pb2.SessionEvent]) -> None:
        """Writes events down: files first, then the store, all of a batch at once."""
        steps = [(e.step.step, e.time.ToNanoseconds() / 1e9, dict(e.step.metrics)) for e in batch if e.HasField("step")]
        evaluations = [event for event in batch if event.HasField("evaluation")]
        await asyncio.to_thread(self._write_files, steps, evaluations)
        state = {**self._ctx.state, "sequence": batch[-1].sequence}
        happenings: list[Happening] = []
        for event in batch:
            if event.HasField("session"):
                self._max_steps = event.session.max_steps or self._max_steps
            if event.HasField("checkpoint") and not event.checkpoint.final:
                state |= {"checkpoint": event.checkpoint.path, "checkpoint_step": event.checkpoint.step}
            happenings += self._happenings(event)
        await self._ctx.emit(*happenings, state=state)

    def ending(self, batch: list[trainer_pb2.SessionEvent]) -> str:
        """What the session does after its last step, as its newest events tell; empty where they do not."""
        train, text = self._ctx.config.train, ""
        for event in batch:
            told = event.evaluation if event.HasField("evaluation") else event.step
            if not 0 < self._max_steps <= told.step:
                continue
            evaluates = event.HasField("step") and (train.validation_datasets or train.validation_split_ratio)
            text = "evaluating the last step" if evaluates else WRITING_MODEL
        return text

    async def finish(self) -> None:
        """Draws the loss."""
        await asyncio.to_thread(_plot_loss, self._ctx.output_dir)

    def _happenings(self, event: trainer_pb2.SessionEvent) -> list[Happening]:
        match event.WhichOneof("event"):
            case "step":
                step = event.step.step
                replayed = step <= self.step
                self.step = max(self.step, step)
                telemetry.publish(dict(event.step.metrics), job=self._ctx.job_id, step=self.step)
                return [
                    job_pb2.StepCompleted(
                        step=step, max_steps=self._max_steps, metrics=event.step.metrics, replayed=replayed
                    )
                ]
            case "checkpoint":
                saved = event.checkpoint
                return [job_pb2.CheckpointSaved(step=saved.step, path=saved.path, final=saved.final)]
            case "evaluation":
                done = event.evaluation
                return [job_pb2.EvaluationCompleted(step=done.step, environment=_VALIDATION, metrics=done.metrics)]
            case "warning":
                severity = job_pb2.Notice.SEVERITY_WARNING
                return [job_pb2.Notice(severity=severity, component="trainer", text=event.warning)]
        return []

    def _write_files(self, steps: list[tuple[int, float, dict[str, float]]], evaluations: list[Any]) -> None:
        self._metrics.append(steps)
        if evaluations:
            with self._evaluations.open("a", encoding="utf-8") as file:
                for event in evaluations:
                    done = event.evaluation
                    line = {"step": done.step, "environment": _VALIDATION, **dict(done.metrics)}
                    file.write(json.dumps(line) + "\n")

    async def _tell_done(self, session: trainer_pb2.Session) -> None:
        """Says that a new job found the checkpoint of an earlier run with nothing left to train."""
        await self._ctx.notice(
            f"the checkpoint of step {session.step} is there already, and max_steps is {session.max_steps}: nothing is "
            "trained. To begin anew set another output_dir, or resume_from_checkpoint: false",
            component="trainer",
            warning=True,
        )

    async def _tell_resume(self, session: trainer_pb2.Session) -> None:
        where = f"the checkpoint of step {session.step}" if session.step else "the beginning"
        again = self.step - session.step
        text = f"training goes on from {where}" + (f"; {again} steps are trained again" if again > 0 else "")
        await self._ctx.notice(text, component="trainer", warning=again > 0)


def _plot_loss(output_dir: Path) -> None:
    file = output_dir / "metrics.jsonl"
    lines = read_metrics(file) if file.exists() else []
    curves = {"training": [(int(line["step"]), line["loss"]) for line in lines if "loss" in line]}
    evaluations = output_dir / "evaluations.jsonl"
    if evaluations.exists():
        done = [json.loads(text) for text in evaluations.read_text(encoding="utf-8").splitlines()]
        # A step that was trained again was evaluated again: the last line of it counts.
        by_step = {int(line["step"]): line for line in done}
        curves[_VALIDATION] = [(step, _loss(line)) for step, line in sorted(by_step.items()) if _loss(line) is not None]
    plot_lines(output_dir / "plots" / "loss.png", curves, title=f"Loss of {output_dir.name}", ylabel="loss")


def _loss(line: dict[str, Any]) -> Any:
    return line.get("loss", line.get("eval/loss"))
