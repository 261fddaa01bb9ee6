"""A replica that takes weights and throws them away: the receiving end of the push benchmark."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

from surogate.config.service import ServiceSettings
from surogate.rpc.server import RpcServer
from surogate.service import main
from surogate.v1 import weights_pb2_grpc
from surogate.weights.servicer import SERVICE, WeightUpdateServicer
from surogate.weights.staging import StagedUpdate, Staging


@asynccontextmanager
async def lifespan(server: RpcServer, _settings: ServiceSettings) -> AsyncIterator[None]:
    async def commit(_update: StagedUpdate) -> timedelta:
        return timedelta(0)

    staging = Staging()
    servicer = WeightUpdateServicer(staging, commit)
    server.add(weights_pb2_grpc.add_WeightUpdateServiceServicer_to_server, servicer, SERVICE)
    try:
        yield
    finally:
        staging.close()


if __name__ == "__main__":
    sys.exit(main(ServiceSettings, lifespan))
