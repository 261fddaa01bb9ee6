"""Prompts by difficulty: drawn from the normal pool, laid aside when a policy finds them too easy or too hard."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from orchestrator_svc.grpo.configured.difficulty import Difficulty, Moves, Pool
from orchestrator_svc.grpo.groups import Group


class Pools:
    """The prompts that are laid aside. Methods that move some return the moves, for the ledger."""

    def __init__(self, rules: Difficulty, laid_aside: Mapping[str, Pool] | None = None) -> None:
        self._rules = rules
        self._aside: dict[str, Pool] = dict(laid_aside or {})

    @property
    def laid_aside(self) -> Mapping[str, Pool]:
        """Prompts that are not drawn, by key."""
        return self._aside

    def is_drawn(self, key: str) -> bool:
        """Whether a prompt is in the normal pool."""
        return key not in self._aside

    def classify(self, groups: Iterable[Group]) -> Moves:
        """Lays aside the prompts of scored groups that were too easy or too hard."""
        moves = {}
        for group in groups:
            key, pool = group.draw.prompt.key, self._rules.pool(float(group.rewards.mean()))
            if pool is not None and self._aside.get(key) != pool:
                moves[key] = pool
        self._aside |= moves
        return moves

    def recycle(self, prompts: int, ordinal: int) -> Moves:
        """Brings some back when no more than `min_normal` of the job's `prompts` are left to draw from."""
        if prompts - len(self._aside) > self._rules.min_normal:
            return {}
        moves = self._bring_back({Pool.EASY: self._rules.recycle_easy, Pool.HARD: self._rules.recycle_hard}, ordinal)
        if len(self._aside) >= prompts:  # nothing is left at all: whatever the rules say, the job goes on
            moves |= self._bring_back({Pool.EASY: 1.0, Pool.HARD: 1.0}, ordinal)
        return moves

    def begin_anew(self) -> Moves:
        """Brings back the parts that are drawn again when a job goes on from a checkpoint."""
        return self._bring_back({Pool.EASY: self._rules.easy_fraction, Pool.HARD: self._rules.hard_fraction}, 0)

    def _bring_back(self, parts: Mapping[Pool, float], ordinal: int) -> dict[str, Pool | None]:
        chosen: list[str] = []
        for pool, part in parts.items():
            members = sorted(key for key, where in self._aside.items() if where is pool)
            if members and part > 0:
                chosen += self._some(members, max(1, round(part * len(members))), f"{pool}/{ordinal}")
        for key in chosen:
            del self._aside[key]
        return dict.fromkeys(chosen)

    def _some(self, keys: Sequence[str], count: int, purpose: str) -> list[str]:
        return random.Random(f"{self._rules.seed}/{purpose}").sample(keys, count)  # noqa: S311 - no secret
