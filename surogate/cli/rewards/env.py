"""`surogate env list`: the environments of a reward service."""

from __future__ import annotations

import asyncio
import json
import sys

from google.protobuf.json_format import MessageToDict
from rich.table import Table
from rich.text import Text

from surogate.cli.console import standard_output
from surogate.cli.exits import OK, reaching
from surogate.cli.rewards.reward_service import START_REWARD, reward_channel
from surogate.v1 import reward_pb2, reward_pb2_grpc
from surogate.visible import visible


def list_environments(address: str | None, *, as_json: bool) -> int:
    """Prints the environments of the service at `address`; None: the built-in ones and those of installed packages."""
    with reaching("reward service", address or "this machine", START_REWARD):
        found = asyncio.run(_listed(address))
    if as_json:
        for environment in found:
            sys.stdout.write(f"{json.dumps(MessageToDict(environment, preserving_proto_field_name=True))}\n")
        return OK
    table = Table("id", "rewards", "from … to", "prompts", "version")
    for environment in found:
        prompts = "own" if environment.has_examples else "args.dataset"
        cells = (environment.id, environment.description, _bounds(environment), prompts, environment.version)
        table.add_row(*(Text(visible(cell)) for cell in cells))
    standard_output().print(table)
    return OK


async def _listed(address: str | None) -> list[reward_pb2.Environment]:
    async with reward_channel(address) as channel:
        listed = await reward_pb2_grpc.RewardServiceStub(channel).ListEnvironments(reward_pb2.ListEnvironmentsRequest())
    return list(listed.environments)


def _bounds(environment: reward_pb2.Environment) -> str:
    ends = [
        f"{getattr(environment, name):g}" if environment.HasField(name) else "" for name in ("min_reward", "max_reward")
    ]
    return " … ".join(ends)
