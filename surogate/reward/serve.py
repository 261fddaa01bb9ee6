"""`serve()`: a whole reward service around the environments that it is given."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NoReturn

from surogate.reward.base import AnyEnvironment
from surogate.reward.registry import Registry
from surogate.reward.settings import RewardSettings
from surogate.service import main

if TYPE_CHECKING:
    from surogate.rpc.server import RpcServer


def serve(*environments: AnyEnvironment, argv: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Serves until SIGTERM or SIGINT, then exits the process. Flags are those of `surogate serve reward`:
    `--listen HOST:PORT`, TLS, tokens, `--workers`; `argv` stands in for the process's own.

    Raises TypeError or ValueError for environments that cannot be served.
    """
    registry = Registry(environments)

    @asynccontextmanager
    async def lifespan(server: RpcServer, settings: RewardSettings) -> AsyncIterator[None]:
        from surogate.reward.lifespan import serving

        async with serving(server, settings, registry):
            yield

    sys.exit(main(RewardSettings, lifespan, argv, prog=prog))
