"""Evaluation on held-out prompts, sampled at the training temperature with seeds that are the same every time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator_svc.grpo.configured.plan import Plan
from orchestrator_svc.grpo.fatal import FATAL
from orchestrator_svc.grpo.groups import Prompt, Rollout
from orchestrator_svc.grpo.rewards.scoring import Scorer
from orchestrator_svc.grpo.rollouts.episodes import Player, Wanted
from orchestrator_svc.grpo.rollouts.metrics import rollout_metrics
from orchestrator_svc.grpo.tasks import together
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

    def __init__(self, plan: Plan, player: Player, scorer: Scorer) -> None:
        self._plan = plan
        self._player = player
        self._scorer = scorer
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
        wanted = Wanted(
            prompt=prompt,
            group_id=f"eval-{step}-{held_out.environment}-{index:06d}",
            n=held_out.rollouts_per_example,
            purpose=f"eval/{held_out.environment}",
            ordinal=index,
            temperature=self._plan.temperature(step),
            min_version=step,
        )
        played = await self._player.play(wanted)
        if not played.rollouts:
            raise SurogateError(played.problem or "the engine gave up on the rollouts")
        scored, problem, _ = await self._scorer.score(
            played.environment, prompt.example, wanted.group_id, played.rollouts
        )
        if not scored:
            raise SurogateError(problem)
        return scored


def shown(environment: str, prompt: Prompt, rollout: Rollout, *, held_out: bool) -> job_pb2.Sample:
    """A rollout as people read it."""
    return job_pb2.Sample(
        environment=environment,
        prompt=prompt.example.prompt[-1].content if prompt.example.prompt else "",
        completion=rollout.transcript,
        answer=prompt.example.answer,
        reward=rollout.reward,
        held_out=held_out,
    )
