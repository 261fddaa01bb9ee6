"""The canary: the same tokens scored by every replica and by the trainer, after a push. They must agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orchestrator_svc.grpo.rollouts.replicas import Replica, Replicas
from orchestrator_svc.grpo.trainer import Trainer
from orchestrator_svc.jobs.context import JobContext
from surogate.errors import SurogateError, UnimplementedError
from surogate.telemetry.metrics import CANARY_DIFF
from surogate.v1 import inference_pb2, trainer_pb2

INTERVAL = 50
"""Steps between checks; the first push of a run is always checked."""

ALARM = 0.5
"""Largest difference of a logprob that may be rounding: bfloat16 gives up to about 0.1 on single tokens."""


class Canary:
    """Compares replicas with the trainer from time to time."""

    def __init__(self, ctx: JobContext, trainer: Trainer, replicas: Replicas) -> None:
        self._ctx = ctx
        self._trainer = trainer
        self._replicas = replicas
        self._checked: int | None = None

    async def check(self, step: int, samples: Sequence[trainer_pb2.TrainingSample]) -> dict[str, float]:
        """Largest absolute difference of a token's logprob after the push of `step`; empty when no check is due.

        A service that cannot do it, or is away just now, is left alone: the check is a service to people.
        """
        if self._checked is not None and step < self._checked + INTERVAL:
            return {}
        self._checked = step
        ids = list(samples[0].token_ids)
        temperature = samples[0].temperature
        try:
            expected = np.array(await self._trainer.logprobs(ids, temperature))
            found = [await self._logprobs(replica, ids, temperature, step) for replica in self._replicas.all]
        except UnimplementedError:
            return {}
        except SurogateError as error:
            self._ctx.log.warning("the canary could not be scored", error=str(error))
            return {}
        differences = [float(np.abs(logprobs - expected).max()) for logprobs in found if logprobs is not None]
        return await self._judged(max(differences)) if differences else {}

    async def _judged(self, worst: float) -> dict[str, float]:
        if not worst <= ALARM:  # NaN is an alarm too
            await self._ctx.notice(
                f"after the push, logprobs of a replica differ from the trainer's by up to {worst:.3g}: rollouts are "
                "sampled from another policy than the one that is trained",
                component="inference",
            )
        return {CANARY_DIFF: worst}

    @staticmethod
    async def _logprobs(
        replica: Replica, ids: Sequence[int], temperature: float, version: int
    ) -> np.ndarray[tuple[int], np.dtype[np.float64]] | None:
        if replica.stub is None:
            return None
        request = inference_pb2.ScoreTokensRequest(temperature=temperature, min_policy_version=version)
        request.sequences.add(ids=ids)
        response = await replica.stub.ScoreTokens(request)
        return np.array(response.sequences[0].logprobs)
