"""Evaluation on held-out prompts, sampled at the training temperature with seeds that are the same every time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator_svc.grpo.batch import FATAL
from orchestrator_svc.grpo.generation import GenerationRequest, Generator
from orchestrator_svc.grpo.groups import Prompt, Rollout
from orchestrator_svc.grpo.metrics import rollout_metrics
from orchestrator_svc.grpo.plan import Plan
from orchestrator_svc.grpo.scoring import Scorer
from orchestrator_svc.grpo.tasks import together
from orchestrator_svc.grpo.tokenizer import ChatTokenizer
from surogate.errors import SurogateError
from surogate.v1 import job_pb2

MAX_CONCURRENT = 256
"""Prompts that are evaluated at once."""

SHOWN = 4
"""Prompts whose completions are shown: the same ones every time, so that they can be laid side by side."""


@dataclass(frozen=True)
class HeldOut:
    """What to evaluate on."""

    environment: str
    """Key of the environment in the job."""
    prompts: Sequence[Prompt]
    rollouts_per_example: int


@dataclass(frozen=True)
class Evaluation:
    """The outcome."""

    metrics: Mapping[str, float]
    samples: list[job_pb2.Sample]
    problem: str
    """The first thing that went wrong with a prompt, for people; empty if nothing did."""


class Evaluator:
    """Evaluates the policy of a step."""

    def __init__(self, plan: Plan, generator: Generator, scorer: Scorer, tokenizer: ChatTokenizer) -> None:
        self._plan = plan
        self._generator = generator
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._room = asyncio.Semaphore(MAX_CONCURRENT)

    async def evaluate(self, held_out: HeldOut, step: int) -> Evaluation:
        """Generates and scores rollouts of every held-out prompt with policy version `step` or a newer one.

        Raises:
            SurogateError: One of FATAL, or what went wrong with every single prompt.
        """
        outcomes = await together(
            self._one(held_out, index, prompt, step) for index, prompt in enumerate(held_out.prompts)
        )
        rollouts = [rollout for outcome in outcomes if isinstance(outcome, list) for rollout in outcome]
        failures = [outcome for outcome in outcomes if isinstance(outcome, SurogateError)]
        if not rollouts:
            raise failures[0]
        metrics = rollout_metrics(rollouts) | {
            "num_prompts": float(len(outcomes) - len(failures)),
            "num_failed": float(len(failures)),
        }
        samples = [
            shown(held_out.environment, prompt, outcome[0], held_out=True)
            for prompt, outcome in zip(held_out.prompts[:SHOWN], outcomes, strict=False)
            if isinstance(outcome, list)
        ]
        return Evaluation(metrics, samples, str(failures[0]) if failures else "")

    async def _one(self, held_out: HeldOut, index: int, prompt: Prompt, step: int) -> list[Rollout] | SurogateError:
        try:
            async with self._room:
                return await self._rollouts(held_out, index, prompt, step)
        except FATAL:
            raise
        except SurogateError as error:
            return error

    async def _rollouts(self, held_out: HeldOut, index: int, prompt: Prompt, step: int) -> list[Rollout]:
        plan = self._plan
        group_id = f"eval-{step}-{held_out.environment}-{index:06d}"
        request = GenerationRequest(
            request_id=group_id,
            prompt=prompt.token_ids,
            n=held_out.rollouts_per_example,
            sampling=plan.sampling.params(
                temperature=plan.temperature(step),
                purpose=f"eval/{held_out.environment}",
                ordinal=index,
                prompt_tokens=len(prompt.token_ids),
                context=plan.context,
            ),
            min_version=step,
        )
        rollouts = await self._generator.generate(request)
        for rollout, text in zip(rollouts, self._tokenizer.decode([r.token_ids for r in rollouts]), strict=True):
            rollout.text = text
        scored, problem = await self._scorer.score(prompt.environment, prompt.example, group_id, rollouts)
        if not scored:
            raise SurogateError(problem or "the engine gave up on the rollouts")
        return scored


def shown(environment: str, prompt: Prompt, rollout: Rollout, *, held_out: bool) -> job_pb2.Sample:
    """A rollout as people read it."""
    return job_pb2.Sample(
        environment=environment,
        prompt=prompt.example.prompt[-1].content if prompt.example.prompt else "",
        completion=rollout.text,
        answer=prompt.example.answer,
        reward=rollout.reward,
        held_out=held_out,
    )
