"""A server on a free port and a channel to it, for contract tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from surogate.config.service import ServiceSettings
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.rpc.server import RpcServer


@asynccontextmanager
async def serving(
    register: Callable[[RpcServer], None], settings: ServiceSettings | None = None
) -> AsyncIterator[RpcServer]:
    """A started server with the servicers that `register` adds, on a free loopback port."""
    server = RpcServer(settings or ServiceSettings())
    register(server)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def connected(
    register: Callable[[RpcServer], None],
    settings: ServiceSettings | None = None,
    security: ClientSecurity | None = None,
    **channel: Any,
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to such a server."""
    async with (
        serving(register, settings) as server,
        open_channel(server.address, security or ClientSecurity(), **channel) as opened,
    ):
        yield opened
