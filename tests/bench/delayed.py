"""The workers of `tests.bench.instant`, which take the time that real ones take: `python -m tests.bench.delayed`.

Seconds by environment variables: BENCH_GENERATE for a group, on average, of which BENCH_AT_ONCE are generated at once;
BENCH_TRAIN for a step; a rollout is scored in 0 to BENCH_SCORE, at random, all of a group at once.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from surogate import service
from surogate.config.service import ServiceSettings
from surogate.rpc.server import RpcServer
from surogate.v1 import inference_pb2, reward_pb2, trainer_pb2
from tests.bench.instant import InstantInference, InstantReward, InstantTrainer, register

GENERATE, TRAIN, SCORE = (float(os.environ.get(f"BENCH_{name}", "0")) for name in ("GENERATE", "TRAIN", "SCORE"))
AT_ONCE = int(os.environ.get("BENCH_AT_ONCE", "4"))


class Trainer(InstantTrainer):
    async def TrainStep(
        self, request_iterator: AsyncIterator[trainer_pb2.TrainStepRequest], context: Any
    ) -> trainer_pb2.TrainStepResponse:
        done = await super().TrainStep(request_iterator, context)
        await asyncio.sleep(TRAIN)
        return done


class Inference(InstantInference):
    def __init__(self) -> None:
        self._room = asyncio.Semaphore(AT_ONCE)
        self._random = random.Random(1)

    async def GenerateRollouts(
        self, request: inference_pb2.GenerateRolloutsRequest, context: Any
    ) -> inference_pb2.GenerateRolloutsResponse:
        async with self._room:
            await asyncio.sleep(GENERATE * self._random.uniform(0.5, 1.5))
        return await super().GenerateRollouts(request, context)


class Reward(InstantReward):
    def __init__(self) -> None:
        self._random = random.Random(2)

    async def ScoreRollouts(
        self, request: reward_pb2.ScoreRolloutsRequest, context: Any
    ) -> reward_pb2.ScoreRolloutsResponse:
        await asyncio.sleep(max(self._random.uniform(0, SCORE) for _ in request.rollouts))
        return await super().ScoreRollouts(request, context)


@asynccontextmanager
async def lifespan(server: RpcServer, _settings: ServiceSettings) -> AsyncIterator[None]:
    register(server, Trainer(), Inference(), Reward())
    yield


if __name__ == "__main__":
    sys.exit(service.main(ServiceSettings, lifespan))
