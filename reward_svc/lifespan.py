"""What lives while the reward service serves: the built-in environments, and those that installed packages bring."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from reward_svc.environments.registry import built_in
from reward_svc.environments.verifiers_environments import installed_packages
from reward_svc.settings import BuiltInSettings
from surogate.reward.lifespan import serving
from surogate.reward.registry import installed
from surogate.rpc.server import RpcServer


@asynccontextmanager
async def lifespan(server: RpcServer, settings: BuiltInSettings) -> AsyncIterator[None]:
    """Registers both services over them."""
    registry = built_in(
        processes=settings.processes,
        allow_unsafe_code=settings.allow_unsafe_code,
        plugins=(*installed(), *installed_packages()) if settings.plugins else (),
    )
    async with serving(server, settings, registry):
        yield
