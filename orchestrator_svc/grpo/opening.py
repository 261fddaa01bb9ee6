"""Opening what a job needs beside its environments: the trainer's session, and the prompts in their order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from orchestrator_svc.grpo.configured.plan import Plan
from orchestrator_svc.grpo.configured.settings import Settings
from orchestrator_svc.grpo.environments import OpenEnvironment
from orchestrator_svc.grpo.evaluate import HeldOut
from orchestrator_svc.grpo.groups import ASSISTANT, Prompt
from orchestrator_svc.grpo.ledger import Ledger, StepState
from orchestrator_svc.grpo.prompts.book import PromptBook
from orchestrator_svc.grpo.prompts.draws import Drawer
from orchestrator_svc.grpo.prompts.gathered import TooLong, tokenize
from orchestrator_svc.grpo.prompts.pools import Pools
from orchestrator_svc.grpo.prompts.pools_file import load_pools
from orchestrator_svc.grpo.reporting.report import origin_state
from orchestrator_svc.grpo.rollouts.replicas import Replicas
from orchestrator_svc.grpo.rollouts.tokenizer import ChatTokenizer
from orchestrator_svc.grpo.stalls import Stalls
from orchestrator_svc.grpo.trainer import Listener, Origin, Trainer
from orchestrator_svc.jobs.context import JobContext
from orchestrator_svc.launchers.base import Worker
from surogate.errors import ConfigError, FailedPreconditionError, Violation
from surogate.structs import to_struct
from surogate.urls import is_url, join
from surogate.v1 import common_pb2, reward_pb2


async def open_trainer(
    ctx: JobContext, worker: Worker, ledger: Ledger, listener: Listener, settings: Settings, stalls: Stalls
) -> Trainer:
    """Opens the trainer's session at the job's last trained step.

    Raises:
        SurogateError: The model or a checkpoint cannot be loaded.
    """
    # Whether to look for a checkpoint is said in each call: after a restart always, whatever the file says.
    config = to_struct({"kind": "grpo", "train": {**settings.train, "resume_from_checkpoint": True}})
    trainer = Trainer(
        worker,
        ledger,
        listener,
        session_id=ctx.job_id,
        config=config,
        output_dir=str(ctx.output_dir),
        keep_interval=settings.keep_interval,
        adapter_name=settings.adapter_name,
        merge_pushes=settings.merge_pushes,
        stalls=stalls,
    )
    last = await ledger.last_step()
    if "origin" in ctx.state:
        origin, step = Origin(**ctx.state["origin"]), int(ctx.state["start_step"])
        if last is not None:
            step = last.step - (last.state is StepState.PREPARED)
        await trainer.open(origin, step)
        if last is not None and last.state is StepState.PREPARED:
            await _finish_step(trainer, ledger, last.step)
        return trainer
    session = await trainer.open(_first_origin(ctx, settings), None)
    if session.step:
        await ctx.notice(f"going on from {session.checkpoint}, step {session.step}", warning=False)
    origin = Origin(session.checkpoint, fresh=not session.checkpoint)
    trainer.origin = origin
    state = {**origin_state(origin), "start_step": session.step, "checkpoint_step": session.step}
    await ctx.update(step=session.step, max_steps=settings.plan.max_steps, state=state)
    return trainer


async def _finish_step(trainer: Trainer, ledger: Ledger, step: int) -> None:
    """Trains the step that was prepared when an orchestrator died. A trainer that lives on may have it done, or be at
    it: until this orchestrator knows, the version that it would push is not the one that it asks for."""
    samples = await ledger.samples(step)
    assert samples is not None, "a prepared step has its samples"
    said = {**await ledger.metrics(step), **await trainer.train(step, samples)}
    await ledger.mark_trained(step, said)


def _first_origin(ctx: JobContext, settings: Settings) -> Origin:
    if not settings.resume:
        return Origin()
    if settings.resume_step is None:
        return Origin(fresh=False)
    kept = str(settings.train.get("checkpoint_dir"))
    folder = kept if is_url(kept) else str(ctx.output_dir)
    return Origin(join(folder, f"checkpoint-{settings.resume_step}"), fresh=False)


def fit(plan: Plan, replicas: Replicas, settings: Settings) -> Plan:
    """The plan within what the replicas can do.

    Raises:
        ConfigError: They cannot take the adapters that will be pushed.
        FailedPreconditionError: A replica serves another model.
    """
    models = [replica.model for replica in replicas.all]
    rank = settings.lora_rank
    if rank and not all(model.lora_enabled for model in models):
        raise ConfigError.of([Violation("infer.enable_lora", "must be true: the trainer will push adapters")])
    least = min(model.max_lora_rank for model in models)
    if rank and rank > least:
        message = f"is {least}, less than train.lora_rank ({rank}): raise one or lower the other"
        raise ConfigError.of([Violation("infer.max_lora_rank", message)])
    if len({model.vocab_size for model in models}) > 1:
        raise FailedPreconditionError("the inference replicas serve different models", reason="REPLICAS_DIFFER")
    least_vocabulary = min(model.vocab_size for model in models)
    context = min([plan.context, *(model.max_model_len for model in models if model.max_model_len)])
    return replace(plan, context=context, vocabulary=max(least_vocabulary, 1))


async def prepare_prompts(
    ctx: JobContext, plan: Plan, environments: Sequence[OpenEnvironment], tokenizer: ChatTokenizer
) -> tuple[list[Prompt], list[HeldOut]]:
    """Tokenizes all examples: those to train on, and the held-out ones by environment.

    Raises:
        ConfigError: There is none that fits, or the chat template cannot be used for the turns of an environment.
    """
    prompts: list[Prompt] = []
    held_out = []
    for item in environments:
        key = item.spec.key
        found, too_long = await asyncio.to_thread(tokenize, tokenizer, key, item.examples.train, context=plan.context)
        held, too_long_held = await asyncio.to_thread(
            tokenize, tokenizer, key, item.examples.held_out, context=plan.context
        )
        if item.environment.max_turns:
            check_turns(tokenizer, [*item.examples.train, *item.examples.held_out][0])
        prompts += found
        if held:
            held_out.append(HeldOut(key, held, item.spec.rollouts_per_example))
        for left_out in (too_long, too_long_held):
            await _tell(ctx, left_out, plan.context)
    return prompts, held_out


def check_turns(tokenizer: ChatTokenizer, example: reward_pb2.Example) -> None:
    """Makes sure that conversations can go on. Raises ConfigError if the chat template does not let them."""
    turn = common_pb2.ChatMessage(role=ASSISTANT, content="Well?")
    answer = common_pb2.ChatMessage(role="user", content="Go on.")
    tokenizer.encode_answer(example.prompt, [turn], [answer], last_id=0)


async def open_book(
    ctx: JobContext, settings: Settings, plan: Plan, prompts: Sequence[Prompt], ledger: Ledger, step: int
) -> tuple[PromptBook, Drawer]:
    """The prompts in their order, and the drawer that goes on where the ledger says.

    A new job that goes on from the checkpoint of `step` takes over what was laid aside then.

    Raises:
        ConfigError: There are fewer prompts than will be drawn, and none may be drawn twice.
    """
    first = await ledger.next_ordinal()
    pools = Pools(plan.difficulty, await ledger.laid_aside())
    if not first and step and not settings.skip_buffer:
        found = await asyncio.to_thread(load_pools, ctx.output_dir, step, prompts, plan.hash_keys)
        pools = Pools(plan.difficulty, found)
        pools.begin_anew()
        await ledger.move(pools.laid_aside)
    book = PromptBook(prompts, plan.difficulty.seed, ratios=plan.ratios, once=plan.draw_once, pools=pools)
    if first:
        book.go_on(await ledger.next_positions())
    elif not settings.skip_progress:
        first = step * plan.groups_per_step
        book.skip(first)
    needed = plan.max_steps * plan.groups_per_step
    if plan.draw_once and len(prompts) < needed:
        message = f"{plan.max_steps} steps draw {needed} prompts, and there are {len(prompts)}"
        raise ConfigError.of([Violation("orch.buffer.sample_without_replacement", message)])
    return book, Drawer(book, ledger, first=first, unfinished=await ledger.open_draws())


async def _tell(ctx: JobContext, left_out: TooLong | None, context: int) -> None:
    if left_out is not None:
        await ctx.notice(
            f"{left_out.count} prompts are left out, as they leave no room for a completion within {context} tokens "
            f"(orch.seq_len); the first is {left_out.first} with {left_out.first_tokens} tokens"
        )
