"""Where an environment is: the built-in reward service of the job, or one of the user's own."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import grpc.aio

from orchestrator_svc.launchers.base import READY_TIMEOUT, Worker
from surogate.errors import UnavailableError
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.v1 import reward_pb2_grpc

RewardStub: TypeAlias = "reward_pb2_grpc.RewardServiceAsyncStub"
EnvironmentStub: TypeAlias = "reward_pb2_grpc.EnvironmentServiceAsyncStub"


class RewardEndpoint(Protocol):
    """Gives stubs of a reward service."""

    @property
    def name(self) -> str:
        """What the ledger calls it."""

    async def reward(self) -> RewardStub:
        """Stub of its RewardService. Raises UnavailableError while it is away."""

    async def environment(self) -> EnvironmentStub:
        """Stub of its EnvironmentService, which need not exist there."""

    async def close(self) -> None:
        """Closes what it opened."""


class BuiltIn:
    """A reward worker of the job: the built-in service, or one of the author's image."""

    def __init__(self, worker: Worker, name: str = "built-in") -> None:
        self._worker = worker
        self.name = name

    async def reward(self) -> RewardStub:
        """Stub of the current incarnation, waited for if need be."""
        return reward_pb2_grpc.RewardServiceStub(await self._channel())

    async def environment(self) -> EnvironmentStub:
        """Stub of the current incarnation, waited for if need be."""
        return reward_pb2_grpc.EnvironmentServiceStub(await self._channel())

    async def close(self) -> None:
        """Nothing: the pool owns the channel."""

    async def _channel(self) -> grpc.aio.Channel:
        try:
            return await self._worker.channel()
        except UnavailableError:
            await self._worker.ready(READY_TIMEOUT)
            return await self._worker.channel()


class Custom:
    """A service at an address of the user's (`env[].address`)."""

    def __init__(self, address: str, security: ClientSecurity) -> None:
        self.name = address
        self._channel = open_channel(address, security)

    async def reward(self) -> RewardStub:
        """Stub of its RewardService."""
        return reward_pb2_grpc.RewardServiceStub(self._channel)

    async def environment(self) -> EnvironmentStub:
        """Stub of its EnvironmentService."""
        return reward_pb2_grpc.EnvironmentServiceStub(self._channel)

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close(None)
