"""A service of one method that waits, for tests of the service runner: `python -m tests.helpers.toy_service`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pydantic_settings import SettingsConfigDict

from surogate.config.service import ServiceSettings
from surogate.errors import InternalError, UnavailableError
from surogate.rpc.server import RpcServer
from surogate.service import main
from surogate.v1 import job_pb2, job_pb2_grpc


class ToySettings(ServiceSettings):
    """A service that waits."""

    model_config = SettingsConfigDict(env_prefix="SUROGATE_TOY_")

    wait: float = 0.0
    """Seconds that GetJob takes."""

    fail: str = ""
    """`start`: fail to start; `later`: fail once it serves."""

    mark: Path | None = None
    """File to write when the lifespan has ended."""


class Jobs(job_pb2_grpc.JobServiceServicer):
    """GetJob waits and answers with the process id; WatchJob never ends by itself."""

    def __init__(self, wait: float) -> None:
        self._wait = wait

    async def GetJob(self, request: job_pb2.GetJobRequest, context: object) -> job_pb2.Job:
        await asyncio.sleep(self._wait)
        return job_pb2.Job(name=f"jobs/{os.getpid()}")

    async def WatchJob(self, request: job_pb2.WatchJobRequest, context: object) -> AsyncIterator[job_pb2.JobEvent]:
        yield job_pb2.JobEvent(sequence=1)
        await asyncio.Event().wait()


@asynccontextmanager
async def lifespan(server: RpcServer, settings: ToySettings) -> AsyncIterator[None]:
    if settings.fail == "start":
        raise UnavailableError("the model cannot be loaded")
    server.add(job_pb2_grpc.add_JobServiceServicer_to_server, Jobs(settings.wait), "surogate.v1.JobService")
    if settings.fail == "later":
        asyncio.get_running_loop().call_later(0.3, server.fail, InternalError("the engine died"))
    yield
    if settings.mark is not None:
        settings.mark.write_text("clean")


if __name__ == "__main__":
    sys.exit(main(ToySettings, lifespan, prog="toy"))
