"""A GRPO job from its workers' start to its last step: everything is put together here, and the loop is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from types import TracebackType

from sqlalchemy import Connection

from orchestrator_svc.grpo.ahead import Ahead
from orchestrator_svc.grpo.batch import Batch, Collector
from orchestrator_svc.grpo.configured.settings import Settings
from orchestrator_svc.grpo.configured.setup import read_settings
from orchestrator_svc.grpo.environments import OpenEnvironment, open_environments, service_of
from orchestrator_svc.grpo.evaluate import Evaluator
from orchestrator_svc.grpo.groups import Cause
from orchestrator_svc.grpo.ledger import Ledger
from orchestrator_svc.grpo.loop import GrpoLoop
from orchestrator_svc.grpo.opening import fit, open_book, open_trainer, prepare_prompts
from orchestrator_svc.grpo.reporting.report import Reporter
from orchestrator_svc.grpo.reporting.step_traces import StepTraces
from orchestrator_svc.grpo.rewards.replacing import Replacing
from orchestrator_svc.grpo.rewards.ruler import Ruler
from orchestrator_svc.grpo.rewards.scoring import Scorer
from orchestrator_svc.grpo.rollouts.canary import Canary
from orchestrator_svc.grpo.rollouts.episodes import Player
from orchestrator_svc.grpo.rollouts.generation import Generator
from orchestrator_svc.grpo.rollouts.replica_scaling import ReplicaScaling
from orchestrator_svc.grpo.rollouts.replicas import Replicas
from orchestrator_svc.grpo.rollouts.tokenizer import OWN, ChatTokenizer
from orchestrator_svc.grpo.stalls import Stalls
from orchestrator_svc.grpo.tasks import unless
from orchestrator_svc.grpo.trainer import Trainer
from orchestrator_svc.jobs.context import JobContext, goes_on
from orchestrator_svc.jobs.workers import start_workers
from orchestrator_svc.jobstore.database import JOB_PATIENCE
from orchestrator_svc.jobstore.scaling import scale_of
from orchestrator_svc.launchers.base import Worker, WorkerPool
from surogate.apart import apart
from surogate.config.job import GrpoJob
from surogate.errors import CancelledError, SurogateError
from surogate.storage.fetch import TEXT, local


async def run(ctx: JobContext, pool: WorkerPool, *, rollout_bytes: int) -> None:
    """Runs a GRPO job, from wherever its ledger says that it is; `rollout_bytes` is the room for its rollout store.

    Raises:
        CancelledError: It was asked to stop; what was trained is in a checkpoint.
        SurogateError: It failed; the message says why.
    """
    assert isinstance(ctx.config, GrpoJob), "jobs of other kinds have other runners"
    await run_with(ctx, pool, replace(read_settings(ctx.config), rollout_bytes=rollout_bytes))


async def run_with(ctx: JobContext, pool: WorkerPool, settings: Settings) -> None:
    """Runs the job that the settings describe; every draw has its end when it returns or raises a SurogateError."""
    ledger = Ledger(ctx.database, ctx.job_id, partial(_fenced, ctx))
    try:
        async with AsyncExitStack() as stack:
            loop = await unless(ctx.cancelled, _put_together(ctx, pool, settings, ledger, stack))
            await ctx.running()
            await loop.run()
        await ledger.close(Cause.SURPLUS)
    except SurogateError as error:
        if goes_on(error):
            raise  # with the draws too
        await ledger.close(Cause.CANCELLED if isinstance(error, CancelledError) else Cause.FAILED)
        raise


def _tokenizer(settings: Settings) -> ChatTokenizer:
    template = str(settings.train.get("template", OWN))
    return ChatTokenizer.load(local(settings.model, "train.model", only=TEXT), template)


async def _put_together(
    ctx: JobContext, pool: WorkerPool, settings: Settings, ledger: Ledger, stack: AsyncExitStack
) -> GrpoLoop:
    """Everything that the loop needs, ready; `stack` closes it, the last first."""
    tokenizer = await apart(partial(_tokenizer, settings))
    scale = await ctx.database.read(lambda c: scale_of(c, ctx.job_id), patience=JOB_PATIENCE)
    workers = await start_workers(ctx, pool, scale)
    environments = await open_environments(settings, workers.rewards, stack)

    stalls = Stalls(ctx)
    trainer, reporter = await _start_trainer(ctx, workers.trainer, settings, ledger, stalls, stack)
    replicas = await _start_replicas(ctx, pool, workers.inference, trainer, stalls, stack)
    plan = fit(settings.plan, replicas, settings)
    prompts, held_out = await prepare_prompts(ctx, plan, environments, tokenizer)
    book, drawer = await open_book(ctx, settings, plan, prompts, ledger, trainer.step)
    generator = Generator(replicas, timeout=settings.timeout)
    scorer, ruler = await _start_scorer(ctx, environments, workers.rewards, settings, stalls, stack)
    last = await ledger.last_step()
    player = Player(plan, generator, scorer, tokenizer)
    collect = Collector(plan, drawer, player, scorer, ruler).collect
    traces = StepTraces(ctx.job_id)

    async def traced(step: int) -> Batch:
        with traces.of(step):
            return await collect(step)

    ahead = Ahead(traced, first=max(trainer.step, last.step if last else 0) + 1, last=plan.max_steps)
    stack.push_async_callback(ahead.close)
    return GrpoLoop(
        ctx,
        plan,
        ledger=ledger,
        book=book,
        trainer=trainer,
        replicas=replicas,
        ahead=ahead,
        scorer=scorer,
        evaluator=Evaluator(plan, player, scorer),
        held_out=held_out,
        reporter=reporter,
        canary=Canary(ctx, trainer, replicas),
        traces=traces,
        origin_step=int(ctx.state["start_step"]),
    )


async def _start_trainer(
    ctx: JobContext, worker: Worker, settings: Settings, ledger: Ledger, stalls: Stalls, stack: AsyncExitStack
) -> tuple[Trainer, Reporter]:
    await ctx.set_status("waiting for the trainer to load the model")
    reporter = Reporter(
        ctx,
        ledger,
        max_steps=settings.plan.max_steps,
        write_metrics=settings.write_metrics,
        rollout_bytes=settings.rollout_bytes,
    )
    trainer = await open_trainer(ctx, worker, ledger, reporter, settings, stalls)
    stack.push_async_exit(partial(_close, trainer))
    await reporter.open(trainer.step)
    return trainer, reporter


async def _start_replicas(
    ctx: JobContext,
    pool: WorkerPool,
    workers: Sequence[Worker],
    trainer: Trainer,
    stalls: Stalls,
    stack: AsyncExitStack,
) -> Replicas:
    """The replicas, with the trainer's weights, and what gives the job more or fewer of them."""
    count = len(workers)
    await ctx.set_status(f"waiting for {count} inference replica{'s' if count > 1 else ''}")
    replicas = Replicas(workers, trainer, stalls)
    stack.push_async_callback(replicas.close)
    await replicas.start()
    scaling = ReplicaScaling(ctx, pool, replicas)
    stack.push_async_callback(scaling.close)
    scaling.start()
    return replicas


async def _start_scorer(
    ctx: JobContext,
    environments: Sequence[OpenEnvironment],
    rewards: Mapping[str, Worker],
    settings: Settings,
    stalls: Stalls,
    stack: AsyncExitStack,
) -> tuple[Scorer, Ruler | None]:
    """The scorer, with what replaces its services while the job runs, and the judge that ranks groups."""
    by_key = {item.environment.key: item.environment for item in environments}
    judge = service_of(settings.ruler.judge, rewards) if settings.ruler else None
    scorer = Scorer(by_key, judge=judge, job=ctx.job_id, patience=settings.timeout, stalls=stalls)
    replacing = Replacing(ctx, scorer)
    stack.push_async_callback(replacing.close)
    await replacing.start()
    return scorer, Ruler(scorer, judge, settings.ruler) if judge and settings.ruler else None


async def _close(
    trainer: Trainer, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """Ends the trainer's session, unless somebody will go on with it."""
    if goes_on(error):
        return
    with suppress(SurogateError):
        await trainer.close()


async def _fenced(ctx: JobContext, work: Callable[[Connection], None]) -> None:
    """Writes to the store, unless another orchestrator has taken the job over."""
    await ctx.update(also=work)
