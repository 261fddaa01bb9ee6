"""Telling what a job does: events and ledger in one transaction, metrics.jsonl, the plot, Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

from orchestrator_svc import metrics as own
from orchestrator_svc.grpo.batch import Batch
from orchestrator_svc.grpo.evaluate import Evaluation, shown
from orchestrator_svc.grpo.ledger import Ledger
from orchestrator_svc.grpo.reporting.output import plot_reward, write_evaluations, write_samples
from orchestrator_svc.grpo.reporting.rollout_rows import rollout_rows
from orchestrator_svc.grpo.rollouts.replicas import Pushed
from orchestrator_svc.grpo.trainer import Origin
from orchestrator_svc.jobs.context import JobContext
from orchestrator_svc.jobs.metrics_file import MetricsFile
from surogate.rollouts import make_room, write_step
from surogate.telemetry import metrics as telemetry
from surogate.v1 import job_pb2, trainer_pb2

SAMPLES_INTERVAL = 10
"""Steps between training rollouts that are shown."""


class Reporter:
    """One job's reports. It also is the trainer's `Listener`."""

    def __init__(
        self, ctx: JobContext, ledger: Ledger, *, max_steps: int, write_metrics: bool = True, rollout_bytes: int = 0
    ) -> None:
        """`rollout_bytes`: room for the rollout store; 0 is none."""
        self._ctx = ctx
        self._ledger = ledger
        self._max_steps = max_steps
        self._write_metrics = write_metrics
        self._rollout_bytes = rollout_bytes
        self._file: MetricsFile | None = None
        self._steps: dict[int, dict[str, float]] = {}
        self._evaluations: dict[tuple[int, str], dict[str, float]] = {}

    async def open(self, step: int) -> None:
        """Reads what was reported before, and puts metrics.jsonl right: it ends with `step` at the latest."""
        self._steps = await self._ledger.step_metrics()
        self._evaluations = await self._ledger.evaluations()
        if self._write_metrics:
            self._file = await asyncio.to_thread(MetricsFile, self._ctx.output_dir / "metrics.jsonl")
            await asyncio.to_thread(self._file.truncate, step)
        await self._append(self._steps)

    @property
    def checkpoint_step(self) -> int:
        """Step of the newest checkpoint of this job."""
        return int(self._ctx.state.get("checkpoint_step", 0))

    def was_evaluated(self, step: int, environment: str) -> bool:
        """Whether an evaluation has been reported."""
        return (step, environment) in self._evaluations

    async def store(self, batch: Batch) -> None:
        """Puts the scored rollouts of a batch into the rollout store. A disk that refuses is told, and no more."""
        if not self._rollout_bytes:
            return
        try:
            await asyncio.to_thread(_store, self._ctx.output_dir, batch, self._rollout_bytes)
        except OSError as error:
            await self._ctx.notice(f"the rollouts of step {batch.step} could not be stored: {error}")

    async def batch(self, batch: Batch) -> None:
        """Counts what was collected, says what went wrong meanwhile, and shows some of it from time to time."""
        own.GROUPS.labels(self._ctx.job_id, "trained").inc(len(batch.groups))
        own.ROLLOUTS.labels(self._ctx.job_id).inc(sum(len(group.rollouts) for group in batch.groups))
        for cause, count in batch.causes.items():
            own.GROUPS.labels(self._ctx.job_id, cause).inc(count)
        if batch.broken or batch.problems:
            details = [*(drop.detail for drop in batch.dropped if drop.detail), *batch.problems]
            await self._ctx.notice(
                f"step {batch.step}: {batch.broken} groups were dropped since they failed, and single rollouts of "
                f"{len(batch.problems)} others; the first failure: {details[0]}"
            )
        if batch.step % SAMPLES_INTERVAL == 1:
            samples = [
                shown(group.draw.prompt.environment, group.draw.prompt, group.rollouts[0], held_out=False)
                for group in batch.groups[:2]
            ]
            await self._ctx.emit(job_pb2.SamplesShown(step=batch.step, samples=samples))

    async def step(self, step: int, metrics: Mapping[str, float], pushed: Pushed | None) -> None:
        """A step is done. `pushed` is None when an orchestrator before this one pushed its weights."""
        happenings: list[job_pb2.StepCompleted | job_pb2.WeightsPushed] = [
            job_pb2.StepCompleted(step=step, max_steps=self._max_steps, metrics=metrics)
        ]
        values = dict(metrics)
        if pushed is not None:
            values[telemetry.STEP_PUSH_BYTES] = float(pushed.num_bytes)
            values[telemetry.STEP_PUSH_PAUSE] = pushed.pause_seconds
            happenings.append(
                job_pb2.WeightsPushed(
                    policy_version=pushed.version,
                    num_bytes=pushed.num_bytes,
                    seconds=pushed.seconds,
                    pause_seconds=pushed.pause_seconds,
                    num_replicas=pushed.num_replicas,
                )
            )
        await self._ctx.emit(*happenings, also=self._ledger.mark_pushed(step, values))
        self._steps[step] = values
        await self._append({step: values})
        telemetry.publish(values, job=self._ctx.job_id, step=step)
        self._show_replicas(step)

    async def replayed(self, step: int, metrics: Mapping[str, float]) -> None:
        """The trainer has trained a step again."""
        await self._ctx.emit(
            job_pb2.StepCompleted(step=step, max_steps=self._max_steps, metrics=metrics, replayed=True)
        )

    async def warned(self, text: str) -> None:
        """The trainer has something to say."""
        await self._ctx.notice(text, component="trainer")

    async def checkpoint(self, saved: trainer_pb2.TrainerCheckpoint, *, final: bool = False) -> None:
        """A checkpoint is complete: the samples before it are not needed any more."""
        state = {**self._ctx.state, **origin_state(Origin(saved.path, fresh=False)), "checkpoint_step": saved.step}
        await self._ctx.emit(
            job_pb2.CheckpointSaved(step=saved.step, path=saved.path, final=final),
            state=state,
            also=self._ledger.cover(saved.step),
        )

    async def evaluation(self, step: int, environment: str, outcome: Evaluation) -> None:
        """An evaluation is done."""
        metrics = dict(outcome.metrics)
        await self._ctx.emit(
            job_pb2.EvaluationCompleted(step=step, environment=environment, metrics=metrics),
            job_pb2.SamplesShown(step=step, samples=outcome.samples),
            also=self._ledger.mark_evaluated(step, environment, metrics),
        )
        self._evaluations[step, environment] = metrics
        folder = self._ctx.output_dir
        await asyncio.to_thread(write_evaluations, folder / "evaluations.jsonl", dict(self._evaluations))
        await asyncio.to_thread(write_samples, folder / "samples.jsonl", step, outcome.samples)
        if outcome.problem:
            await self._ctx.notice(
                f"evaluation of step {step}: {metrics['num_failed']:.0f} prompts could not be evaluated; the first "
                f"failure: {outcome.problem}"
            )
        await self.plot()

    def _show_replicas(self, step: int) -> None:
        """How far each replica is behind the version of `step`."""
        for worker in self._ctx.pool.workers if self._ctx.pool else ():
            if worker.component == "inference":
                own.REPLICA_LAG.labels(self._ctx.job_id, worker.name).set(max(step - worker.policy_version, 0))

    async def _append(self, steps: Mapping[int, Mapping[str, float]]) -> None:
        if self._file is not None:
            now = time.time()
            await asyncio.to_thread(self._file.append, [(step, now, values) for step, values in steps.items()])

    async def plot(self) -> None:
        """Draws plots/reward.png."""
        path = self._ctx.output_dir / "plots" / "reward.png"
        await asyncio.to_thread(plot_reward, path, dict(self._steps), dict(self._evaluations))


def _store(output_dir: Path, batch: Batch, max_bytes: int) -> None:
    write_step(output_dir, batch.step, rollout_rows(batch))
    make_room(output_dir, max_bytes)


def origin_state(origin: Origin) -> dict[str, object]:
    """Where a trainer starts, as it is kept in the job's state."""
    return {"origin": {"checkpoint": origin.checkpoint, "fresh": origin.fresh}}
