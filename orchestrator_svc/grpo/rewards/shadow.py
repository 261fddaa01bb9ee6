"""A second reward service that scores what the first one scored: its rewards are compared, and never trained on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import numpy as np

from orchestrator_svc.grpo.rewards.services import RewardEndpoint
from surogate.errors import SurogateError
from surogate.telemetry.log import get_logger
from surogate.v1 import reward_pb2

MAX_PENDING = 256
"""Groups that wait for the shadow; further ones are skipped, for training does not wait."""

AGREE = 1e-6
"""Rewards no further apart than this agree."""

_log = get_logger("orchestrator")


class Shadow:
    """Compares one service with another, until it is closed."""

    def __init__(self, endpoint: RewardEndpoint) -> None:
        self.endpoint = endpoint
        self._pending: set[asyncio.Task[None]] = set()
        self._pairs: list[tuple[float, float]] = []
        self._failed = 0
        self._skipped = 0

    def offer(self, request: reward_pb2.ScoreRolloutsRequest, rewards: Mapping[str, float], timeout: float) -> None:
        """Has a group scored in the background; `rewards` are those that count, by rollout id."""
        if len(self._pending) >= MAX_PENDING:
            self._skipped += 1
            return
        task = asyncio.create_task(self._compare(request, rewards, timeout), name="shadow")
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    def drain(self) -> dict[str, float]:
        """What was found since the last time: `compared`, `agreement`, `mean_abs_diff`, `correlation`, `failed`,
        `skipped`; those that cannot be told are left out."""
        pairs = np.array(self._pairs, np.float64).reshape(-1, 2)
        found = {"compared": float(len(pairs)), "failed": float(self._failed), "skipped": float(self._skipped)}
        self._pairs, self._failed, self._skipped = [], 0, 0
        if not len(pairs):
            return found
        apart = np.abs(pairs[:, 0] - pairs[:, 1])
        found |= {"agreement": float((apart <= AGREE).mean()), "mean_abs_diff": float(apart.mean())}
        if len(pairs) > 1 and pairs.std(axis=0).all():
            found["correlation"] = float(np.corrcoef(pairs.T)[0, 1])
        return found

    async def close(self) -> None:
        """Gives up what is pending."""
        tasks = list(self._pending)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _compare(
        self, request: reward_pb2.ScoreRolloutsRequest, rewards: Mapping[str, float], timeout: float
    ) -> None:
        try:
            stub = await self.endpoint.reward()
            response = await stub.ScoreRollouts(request, timeout=timeout)
        except SurogateError as error:
            self._failed += len(rewards)
            _log.warning("the shadow could not score", service=self.endpoint.name, error=str(error))
            return
        answered = {r.rollout_id: r.score.reward for r in response.results if r.WhichOneof("outcome") == "score"}
        common = [(reward, answered[key]) for key, reward in rewards.items() if np.isfinite(answered.get(key, np.nan))]
        self._failed += len(rewards) - len(common)
        self._pairs += common
