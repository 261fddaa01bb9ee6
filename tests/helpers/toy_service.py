"""A service of one method that waits, for tests of the service runner: `python -m tests.helpers.toy_service`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from pydantic_settings import SettingsConfigDict

from surogate.config.service import ServiceSettings
from surogate.errors import InternalError, UnavailableError
from surogate.rpc.server import RpcServer
from surogate.service import main
from surogate.telemetry.log import get_logger
from surogate.v1 import job_pb2, job_pb2_grpc

_log = get_logger("toy")


class ToySettings(ServiceSettings):
    """A service that waits."""

    model_config = SettingsConfigDict(env_prefix="SUROGATE_TOY_")

    wait: float = 0.0
    """Seconds that GetJob takes."""

    fail: str = ""
    """`start`: fail to start; `later`: fail once GetJob was called."""

    mark: Path | None = None
    """File to write when the lifespan has ended."""


class Jobs(job_pb2_grpc.JobServiceServicer):
    """GetJob waits and answers with the process id; WatchJob never ends by itself."""

    def __init__(self, wait: float, called: Callable[[], None]) -> None:
        self._wait = wait
        self._called = called

    async def GetJob(self, request: job_pb2.GetJobRequest, context: object) -> job_pb2.Job:
        _log.info("GetJob waits")
        await asyncio.sleep(self._wait)
        self._called()
        return job_pb2.Job(name=f"jobs/{os.getpid()}")

    async def WatchJob(self, request: job_pb2.WatchJobRequest, context: object) -> AsyncIterator[job_pb2.JobEvent]:
        yield job_pb2.JobEvent(sequence=1)
        await asyncio.Event().wait()


@asynccontextmanager
async def lifespan(server: RpcServer, settings: ToySettings) -> AsyncIterator[None]:
    if settings.fail == "start":
        raise UnavailableError("the model cannot be loaded")

    def called() -> None:
        if settings.fail == "later":
            server.fail(InternalError("the engine died"))

    jobs = Jobs(settings.wait, called)
    server.add(job_pb2_grpc.add_JobServiceServicer_to_server, jobs, "surogate.v1.JobService")
    yield
    if settings.mark is not None:
        settings.mark.write_text("clean")


if __name__ == "__main__":
    sys.exit(main(ToySettings, lifespan, prog="toy"))
