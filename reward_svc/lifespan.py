"""What lives while the reward service serves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from reward_svc.environments.registry import Registry
from reward_svc.scoring import ScoringPool
from reward_svc.service import EnvironmentServicer, RewardServicer
from reward_svc.settings import RewardSettings
from surogate.errors import UnavailableError
from surogate.rpc.server import RpcServer
from surogate.v1 import reward_pb2_grpc

REWARD_SERVICE = "surogate.v1.RewardService"
ENVIRONMENT_SERVICE = "surogate.v1.EnvironmentService"


@asynccontextmanager
async def lifespan(
    server: RpcServer, settings: RewardSettings, registry: Registry | None = None
) -> AsyncIterator[None]:
    """Registers both services over the built-in environments, or over `registry`."""
    registry = registry or Registry()

    def give_up() -> None:
        server.fail(UnavailableError(f"{settings.max_hung} scorings hang"))

    pool = ScoringPool(max_workers=settings.workers, max_abandoned=settings.max_hung, on_exhausted=give_up)
    reward = RewardServicer(registry, pool, item_timeout=settings.item_timeout, max_group=settings.max_group)
    server.add(reward_pb2_grpc.add_RewardServiceServicer_to_server, reward, REWARD_SERVICE)
    server.add(
        reward_pb2_grpc.add_EnvironmentServiceServicer_to_server, EnvironmentServicer(registry), ENVIRONMENT_SERVICE
    )
    server.set_serving(REWARD_SERVICE, True)
    server.set_serving(ENVIRONMENT_SERVICE, True)
    yield
