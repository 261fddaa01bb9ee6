"""The GRPO loop: collect rollouts, weigh them against their group, train, push, write it down. Again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from orchestrator_svc.grpo.ahead import Ahead
from orchestrator_svc.grpo.batch import Batch
from orchestrator_svc.grpo.configured.plan import Plan
from orchestrator_svc.grpo.evaluate import Evaluator, HeldOut
from orchestrator_svc.grpo.ledger import Ledger, StepState
from orchestrator_svc.grpo.prompts.book import PromptBook
from orchestrator_svc.grpo.prompts.pools_file import save_pools
from orchestrator_svc.grpo.reporting.metrics import batch_metrics, step_clock, trained_tokens
from orchestrator_svc.grpo.reporting.report import Reporter
from orchestrator_svc.grpo.reporting.step_traces import StepTraces
from orchestrator_svc.grpo.rewards.scoring import Scorer
from orchestrator_svc.grpo.rollouts.canary import Canary
from orchestrator_svc.grpo.rollouts.replicas import Replicas
from orchestrator_svc.grpo.samples import training_samples
from orchestrator_svc.grpo.tasks import unless
from orchestrator_svc.grpo.trainer import Trainer
from orchestrator_svc.jobs.context import WRITING_MODEL, JobContext
from surogate.errors import CancelledError
from surogate.telemetry import metrics as names
from surogate.telemetry.tracing import span
from surogate.v1 import trainer_pb2


class GrpoLoop:
    """One run of the loop, from where the ledger says the job is to its last step.

    `origin_step` is the step of the checkpoint that the job began with, 0 if it began with none.
    """

    def __init__(
        self,
        ctx: JobContext,
        plan: Plan,
        *,
        ledger: Ledger,
        book: PromptBook,
        trainer: Trainer,
        replicas: Replicas,
        ahead: Ahead,
        scorer: Scorer,
        evaluator: Evaluator,
        held_out: Sequence[HeldOut],
        reporter: Reporter,
        canary: Canary,
        traces: StepTraces,
        origin_step: int,
    ) -> None:
        self._ctx = ctx
        self._plan = plan
        self._ledger = ledger
        self._book = book
        self._trainer = trainer
        self._replicas = replicas
        self._ahead = ahead
        self._scorer = scorer
        self._evaluator = evaluator
        self._held_out = held_out
        self._reporter = reporter
        self._canary = canary
        self._traces = traces
        self._origin_step = origin_step

    async def run(self) -> None:
        """Trains to the last step. The trainer is at the ledger's last trained step, and the replicas serve it.

        Raises:
            CancelledError: Somebody asked the job to stop; no step is half done.
        """
        await self._finish_interrupted()
        done = self._trainer.step
        self._ahead.open(done + 1 + self._plan.run_ahead)
        try:
            await self._settle(done)
            for step in range(done + 1, self._plan.max_steps + 1):
                await self._step(step)
                await self._settle(step)
        except CancelledError:
            await self._save()
            raise
        await self._ctx.running(WRITING_MODEL)
        await self._reporter.checkpoint(await self._trainer.checkpoint(final=True), final=True)
        await self._save_pools(self._plan.max_steps)
        await self._reporter.plot()

    async def _save(self) -> None:
        """A checkpoint of what was trained, before a cancelled job ends."""
        await self._ahead.close()
        await self._checkpoint(self._trainer.step)
        await self._reporter.plot()

    async def _step(self, step: int) -> None:
        """One optimiser step, and its weights on the replicas, as one trace."""
        try:
            with self._traces.of(step):
                await self._traced_step(step)
        finally:
            self._traces.end(step)

    async def _traced_step(self, step: int) -> None:
        started = time.perf_counter()
        samples, said = await self._samples(step)
        trained_from = time.perf_counter()
        with span("train", step=step, samples=len(samples)):
            said |= await self._trainer.train(step, samples)
        await self._ledger.mark_trained(step, said)
        pushed_from = time.perf_counter()
        with span("push", version=step):
            pushed = await self._replicas.push()
        self._ahead.open(step + 1 + self._plan.run_ahead)
        now = time.perf_counter()
        said |= await self._canary.check(step, samples)
        said |= self._scorer.shadow_metrics()
        said |= step_clock(
            waited=trained_from - started,
            trained=pushed_from - trained_from,
            pushed=now - pushed_from,
            total=now - started,
            tokens=said.get(names.TOKENS_TRAINED, 0.0),
        )
        await self._reporter.step(step, said, pushed)

    async def _samples(self, step: int) -> tuple[list[trainer_pb2.TrainingSample], dict[str, float]]:
        """Samples of a step, from the ledger if they are there, else of a new batch, which is written there."""
        prepared = await self._ledger.samples(step)
        if prepared is not None:
            return prepared, await self._ledger.metrics(step)
        batch = await unless(self._ctx.cancelled, self._ahead.take(step))
        samples = self._weighed(batch)
        said = {**batch_metrics(batch), names.TOKENS_TRAINED: float(trained_tokens(batch.groups))}
        moves = self._book.pools.classify(batch.scored)
        await self._reporter.store(batch)
        await self._ledger.prepare(step, samples, said, batch.groups, batch.dropped, moves)
        await self._reporter.batch(batch)
        return samples, said

    def _weighed(self, batch: Batch) -> list[trainer_pb2.TrainingSample]:
        plan = self._plan
        return [
            sample
            for group in batch.groups
            for sample in training_samples(
                group,
                plan.advantage(group.rewards, group.lengths),
                repetition_penalty=plan.sampling.repetition_penalty,
            )
        ]

    async def _finish_interrupted(self) -> None:
        """A step that was trained, but not reported, before this orchestrator started: the replicas have it by now."""
        last = await self._ledger.last_step()
        if last is not None and last.state is StepState.TRAINED:
            await self._reporter.step(last.step, last.metrics, None)

    async def _settle(self, step: int) -> None:
        """What is due after a step, unless it was done before: a checkpoint, evaluations."""
        plan = self._plan
        if plan.checkpoint_interval and step and step % plan.checkpoint_interval == 0 and step < plan.max_steps:
            await self._checkpoint(step)
        if self._evaluation_is_due(step):
            await self._evaluate_all(step)

    async def _checkpoint(self, step: int) -> None:
        if step > self._reporter.checkpoint_step:
            await self._reporter.checkpoint(await self._trainer.checkpoint())
            await self._save_pools(step)

    async def _save_pools(self, step: int) -> None:
        book, keys = self._book, self._plan.hash_keys
        aside = dict(book.pools.laid_aside)
        if aside:
            await asyncio.to_thread(save_pools, self._ctx.output_dir, step, aside, book.prompts, keys)

    def _evaluation_is_due(self, step: int) -> bool:
        plan = self._plan
        if not plan.evaluation_interval:
            return False
        if step == 0:
            return plan.evaluate_base
        if step == self._origin_step and not plan.evaluate_origin:
            return False
        return step == plan.max_steps or step % plan.evaluation_interval == 0

    async def _evaluate_all(self, step: int) -> None:
        due = [item for item in self._held_out if not self._reporter.was_evaluated(step, item.environment)]
        if not due:
            return
        if self._plan.restart_on_evaluation:
            await self._ahead.pause()
        for held_out in due:
            await self._evaluate(held_out, step)
        self._ahead.resume()

    async def _evaluate(self, held_out: HeldOut, step: int) -> None:
        await self._ctx.running(f"evaluating step {step} on {held_out.environment}")
        outcome = await unless(self._ctx.cancelled, self._evaluator.evaluate(held_out, step))
        await self._reporter.evaluation(step, held_out.environment, outcome)
        await self._ctx.running()
