"""A judge that compares the rollouts of a group, beside the environment's own rewards."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from orchestrator_svc.grpo.configured.settings import RulerSpec
from orchestrator_svc.grpo.fatal import FATAL, JudgeFailedError
from orchestrator_svc.grpo.groups import Group, Rollout
from orchestrator_svc.grpo.rewards.scoring import Environment, Scorer
from surogate.errors import SurogateError


class Ruler:
    """Has groups judged, a bounded number at once, by the environment `judge` of the built-in reward service."""

    def __init__(self, scorer: Scorer, judge: Environment, spec: RulerSpec) -> None:
        self._scorer = scorer
        self._judge = judge
        self._spec = spec
        self._room = asyncio.Semaphore(spec.max_concurrent)

    @property
    def replaces(self) -> bool:
        """Whether a group without a score has no reward."""
        return self._spec.mode == "replace"

    async def judge(self, group: Group) -> str:
        """Puts the judge's scores into rewards and components; returns what went wrong, and then changes nothing.

        Raises:
            JudgeFailedError: It gave no scores, and that is not to be swallowed.
        """
        try:
            async with self._room:
                verdicts = await self._ask(group)
        except FATAL:
            raise
        except SurogateError as error:
            if not self._spec.swallow:
                raise JudgeFailedError(f"orch.ruler: {error}") from error
            return str(error)
        for rollout in group.rollouts:
            self._apply(rollout, verdicts[rollout.rollout_id])
        return ""

    async def _ask(self, group: Group) -> Mapping[str, Rollout]:
        """The rollouts as the judge scores them, by id."""
        copies = [replace(rollout) for rollout in group.rollouts]
        scored, problem, _ = await self._scorer.score(
            self._judge, group.draw.prompt.example, group.draw.group_id, copies
        )
        if len(scored) < len(copies):
            raise SurogateError(problem)
        return {rollout.rollout_id: rollout for rollout in scored}

    def _apply(self, rollout: Rollout, verdict: Rollout) -> None:
        parts = {"judge": verdict.reward, **{f"judge.{name}": value for name, value in verdict.components.items()}}
        if self._spec.mode != "metric":
            parts["environment"] = rollout.reward
            kept = 0.0 if self._spec.mode == "replace" else rollout.reward
            rollout.reward = kept + self._spec.weight * verdict.reward
        rollout.components = {**rollout.components, **parts}
