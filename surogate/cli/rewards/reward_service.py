"""The reward service that a command asks: one at an address, or a built-in one of its own."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio

from surogate.process import start_service
from surogate.rpc.channel import ClientSecurity, open_channel

START_REWARD = "surogate serve reward --listen HOST:PORT"


@asynccontextmanager
async def reward_channel(address: str | None) -> AsyncIterator[grpc.aio.Channel]:
    """To the service at `address`; None starts the built-in one, with what packages bring, and ends it after."""
    if address is not None:
        async with open_channel(address) as channel:
            yield channel
        return
    token = secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory(prefix="surogate-reward-") as folder:
        service = await start_service("reward_svc", log_file=Path(folder) / "reward.log", token=token, name="reward")
        try:
            async with open_channel(service.address, ClientSecurity(token=token)) as channel:
                yield channel
        finally:
            await service.stop()
