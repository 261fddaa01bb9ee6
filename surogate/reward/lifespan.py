"""What lives while a reward service serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from surogate.errors import UnavailableError
from surogate.reward.registry import Registry
from surogate.reward.scoring import ScoringPool
from surogate.reward.service import EnvironmentServicer, RewardServicer
from surogate.reward.settings import RewardSettings
from surogate.rpc.server import RpcServer
from surogate.v1 import reward_pb2_grpc

REWARD_SERVICE = "surogate.v1.RewardService"
ENVIRONMENT_SERVICE = "surogate.v1.EnvironmentService"


@asynccontextmanager
async def serving(server: RpcServer, settings: RewardSettings, registry: Registry) -> AsyncIterator[None]:
    """Registers both services over the environments of `registry`."""

    await asyncio.to_thread(registry.open)

    def give_up() -> None:
        server.fail(UnavailableError(f"{settings.max_hung} scorings hang"))

    pool = ScoringPool(max_workers=settings.workers, max_abandoned=settings.max_hung, on_exhausted=give_up)
    reward = RewardServicer(registry, pool, item_timeout=settings.item_timeout, max_group=settings.max_group)
    server.add(reward_pb2_grpc.add_RewardServiceServicer_to_server, reward, REWARD_SERVICE)
    environment = EnvironmentServicer(registry, pool, turn_timeout=settings.item_timeout)
    server.add(reward_pb2_grpc.add_EnvironmentServiceServicer_to_server, environment, ENVIRONMENT_SERVICE)
    try:
        yield
    finally:
        await asyncio.to_thread(registry.close)
        pool.close()
