"""A reward service in the test's process, and groups to ask it about."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from surogate.reward.base import AnyEnvironment
from surogate.reward.lifespan import serving
from surogate.reward.registry import Registry
from surogate.reward.settings import RewardSettings
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.rpc.server import RpcServer
from surogate.rpc.status import from_status
from surogate.structs import to_struct
from surogate.v1 import reward_pb2, reward_pb2_grpc


@asynccontextmanager
async def reward_server(
    *environments: AnyEnvironment, plugins: Iterable[Any] = (), **settings: Any
) -> AsyncIterator[str]:
    """Serves environments on a free port; yields the address."""
    chosen = RewardSettings(**settings)
    server = RpcServer(chosen)
    async with serving(server, chosen, Registry(environments, plugins=plugins)):
        await server.start()
        yield server.address
        await server.stop()


@asynccontextmanager
async def reward_stub(*environments: AnyEnvironment, **settings: Any) -> AsyncIterator[Any]:
    """A stub of RewardService over environments."""
    async with reward_server(*environments, **settings) as address, open_channel(address, ClientSecurity()) as channel:
        yield reward_pb2_grpc.RewardServiceStub(channel)


def group(
    environment: str, *completions: str, answer: str = "", args: Any = None, fields: Any = None, **others: Any
) -> reward_pb2.ScoreRolloutsRequest:
    """A group of completions of one example."""
    rollouts = [reward_pb2.Rollout(rollout_id=f"r{i}", completion=text) for i, text in enumerate(completions)]
    example = reward_pb2.Example(id="0", answer=answer, fields=to_struct(fields or {}))
    return reward_pb2.ScoreRolloutsRequest(
        environment=environment, rollouts=rollouts, example=example, args=to_struct(args or {}), **others
    )


def outcomes(response: reward_pb2.ScoreRolloutsResponse) -> list[float | str]:
    """The reward of each rollout, or the reason of its error."""
    return [
        item.score.reward if item.HasField("score") else from_status(item.error).reason for item in response.results
    ]
