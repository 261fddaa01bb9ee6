"""Collecting what a step trains on: prompts are drawn, rollouts generated, and groups scored while others generate."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator_svc.grpo.clock import Stopwatch
from orchestrator_svc.grpo.configured.advantage import has_signal
from orchestrator_svc.grpo.configured.filters import sort_out
from orchestrator_svc.grpo.configured.plan import Plan
from orchestrator_svc.grpo.fatal import FATAL
from orchestrator_svc.grpo.groups import Cause, Draw, Dropped, Group, Rollout
from orchestrator_svc.grpo.prompts.draws import Drawer
from orchestrator_svc.grpo.rewards.ruler import Ruler
from orchestrator_svc.grpo.rewards.scoring import Environment, Scored, Scorer
from orchestrator_svc.grpo.rollouts.episodes import Played, Player, Wanted
from orchestrator_svc.grpo.tasks import stop
from surogate.errors import FailedPreconditionError, SurogateError
from surogate.telemetry.tracing import span

_BROKEN = (Cause.REWARD, Cause.GENERATION, Cause.ENVIRONMENT, Cause.JUDGE)
_SCORED = (Cause.ZERO_SIGNAL, Cause.SURPLUS)
"""Causes for which a group is dropped after it was scored."""


class NothingToTrainError(FailedPreconditionError):
    """Every prompt drawn for a step was dropped."""

    reason = "NOTHING_TO_TRAIN"


@dataclass
class Batch:
    """Groups to train on in one step, and what was dropped on the way."""

    step: int
    temperature: float
    groups: list[Group] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What went wrong with single rollouts, for people."""
    generated: int = 0
    """Rollouts that the filters saw."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Of those, how many each filter found."""
    generating: Stopwatch = field(default_factory=Stopwatch)
    scoring: Stopwatch = field(default_factory=Stopwatch)

    @property
    def draws(self) -> list[Draw]:
        """Draws that came to an end, a good one or not."""
        return [group.draw for group in self.groups] + [drop.draw for drop in self.dropped]

    @property
    def scored(self) -> list[Group]:
        """Groups that have rewards, trained on or not."""
        return self.groups + [drop.group for drop in self.dropped if drop.cause in _SCORED and drop.group]

    @property
    def causes(self) -> Counter[Cause]:
        """Dropped groups by cause."""
        return Counter(drop.cause for drop in self.dropped)

    @property
    def broken(self) -> int:
        """Groups that failed, as against those that are of no use."""
        return sum(self.causes[cause] for cause in _BROKEN)


class Collector:
    """Makes a group of rollouts of every prompt, and batches of groups."""

    def __init__(self, plan: Plan, drawer: Drawer, player: Player, scorer: Scorer, ruler: Ruler | None) -> None:
        self._plan = plan
        self._drawer = drawer
        self._player = player
        self._scorer = scorer
        self._ruler = ruler

    async def collect(self, step: int) -> Batch:
        """Collects the batch of a step. Dropped groups are replaced as long as the plan's budget lasts.

        Raises:
            NothingToTrainError: No group is left.
            SurogateError: One of FATAL.
        """
        plan = self._plan
        batch = Batch(step, plan.temperature(step))
        budget = plan.refill_budget
        running = self._start(batch, await self._drawer.take(step, plan.groups_started))
        try:
            while running and len(batch.groups) < plan.groups_per_step and not self._hopeless(batch):
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del running[task]
                    _add(batch, task.result())
                missing = min(plan.groups_per_step - len(batch.groups) - len(running), budget)
                if missing > 0:
                    budget -= missing
                    running |= self._start(batch, await self._drawer.take(step, missing))
        except asyncio.CancelledError:
            self._drawer.give_back([*batch.draws, *running.values()])
            raise
        finally:
            await stop(running)
        batch.dropped += [Dropped(draw, Cause.SURPLUS) for draw in running.values()]
        return _closed(batch, plan.groups_per_step)

    def _start(self, batch: Batch, draws: Sequence[Draw]) -> dict[asyncio.Task[Group | Dropped], Draw]:
        return {asyncio.create_task(self._group(batch, draw), name=f"group {draw.group_id}"): draw for draw in draws}

    def _hopeless(self, batch: Batch) -> bool:
        """Whether all that was tried is broken: refilling would only take longer to fail."""
        return not batch.groups and batch.broken >= 2 * self._plan.groups_per_step

    async def _group(self, batch: Batch, draw: Draw) -> Group | Dropped:
        """The rollouts of a prompt, with rewards that differ; or why there are none to train on."""
        played = await self._play(batch, draw)
        if isinstance(played, Dropped):
            return played
        rollouts = self._filter(batch, played.rollouts)
        if len(rollouts) < self._plan.min_group:
            return Dropped(draw, Cause.FILTERED)
        group = Group(draw, rollouts, batch.temperature)
        if batch.step - 1 - group.oldest_version > self._plan.max_off_policy_steps:
            return Dropped(draw, Cause.STALE, group=group)
        dropped = await self._reward(batch, group, played.environment)
        if dropped is not None:
            return dropped
        return group if self._teaches(group) else Dropped(draw, Cause.ZERO_SIGNAL, group=group)

    async def _reward(self, batch: Batch, group: Group, environment: Environment) -> Dropped | None:
        """Gives the group its rewards, those of the judge too; or says why it has none."""
        try:
            group.scored_by = environment.endpoint.name
            with batch.scoring.running(), span("score", group=group.draw.group_id):
                group.rollouts, problem, group.scored_by = await self._score(environment, group.draw, group.rollouts)
                if len(group.rollouts) < self._plan.min_group:
                    return Dropped(group.draw, Cause.REWARD, problem)
                unjudged = await self._ruler.judge(group) if self._ruler else ""
        except FATAL:
            raise
        except SurogateError as error:
            return Dropped(group.draw, Cause.REWARD, str(error))
        if unjudged and self._ruler and self._ruler.replaces:
            return Dropped(group.draw, Cause.JUDGE, unjudged)
        batch.problems += [text for text in (problem, unjudged) if text]
        return None

    async def _play(self, batch: Batch, draw: Draw) -> Played | Dropped:
        """The rollouts of a prompt: as many as a group needs, at least."""
        try:
            with batch.generating.running(), span("generate", group=draw.group_id):
                played = await self._player.play(self._wanted(batch, draw))
        except FATAL:
            raise
        except SurogateError as error:
            return Dropped(draw, Cause.GENERATION, str(error))
        if len(played.rollouts) < self._plan.min_group:
            return Dropped(draw, played.cause, played.problem or "the engine gave up on the rollouts")
        if played.problem:
            batch.problems.append(played.problem)
        return played

    def _filter(self, batch: Batch, rollouts: list[Rollout]) -> list[Rollout]:
        kept, found = sort_out(rollouts, self._plan.filters, self._plan.vocabulary)
        batch.generated += len(rollouts)
        batch.filtered.update(found)
        return kept

    def _teaches(self, group: Group) -> bool:
        plan = self._plan
        if plan.drop_extremes and group.rewards.mean() in (0.0, 1.0):
            return False
        return has_signal(group.rewards) or not plan.needs_signal

    def _wanted(self, batch: Batch, draw: Draw) -> Wanted:
        return Wanted(
            prompt=draw.prompt,
            group_id=draw.group_id,
            n=self._plan.rollouts_per_example,
            purpose="train",
            ordinal=draw.ordinal,
            temperature=batch.temperature,
            min_version=max(0, batch.step - 1 - self._plan.run_ahead),
        )

    async def _score(self, environment: Environment, draw: Draw, rollouts: list[Rollout]) -> Scored:
        if not self._plan.ask_rewards:
            for rollout in rollouts:
                rollout.reward = 0.0
            return Scored(rollouts, "", environment.endpoint.name)
        return await self._scorer.score(environment, draw.prompt.example, draw.group_id, rollouts)


def _add(batch: Batch, outcome: Group | Dropped) -> None:
    if isinstance(outcome, Group):
        batch.groups.append(outcome)
    else:
        batch.dropped.append(outcome)


def _closed(batch: Batch, size: int) -> Batch:
    """The batch with its groups in the order of their draws, whatever order they finished in."""
    batch.groups.sort(key=lambda group: group.draw.ordinal)
    batch.dropped += [Dropped(group.draw, Cause.SURPLUS, group=group) for group in batch.groups[size:]]
    del batch.groups[size:]
    if not batch.groups:
        raise NothingToTrainError(_nothing(batch))
    return batch


def _nothing(batch: Batch) -> str:
    causes = ", ".join(f"{count} for {cause}" for cause, count in sorted(batch.causes.items()))
    detail = next((drop.detail for drop in batch.dropped if drop.detail), "")
    hint = f"; the first failure: {detail}" if detail else "; rewards that are all equal in a group teach nothing"
    return f"step {batch.step} has nothing to train on: all {len(batch.dropped)} prompts were dropped ({causes}){hint}"
