"""The standard health service, and waiting for another service to report SERVING."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from surogate.errors import DeadlineError, NotFoundError, SurogateError, UnavailableError
from surogate.telemetry import metrics

SERVICE = "grpc.health.v1.Health"
"""The health service's own name. It is SERVING as long as the process answers, whatever it does: for liveness probes,
which must not end a process that loads a model or drains."""

_Status = health_pb2.HealthCheckResponse


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # its package has no types
    """Health per service name; the empty name stands for all of them together."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._draining = False
        self._changed = asyncio.Event()

    def set(self, service: str, serving: bool) -> None:
        """Reports `service` (its full name) as SERVING or NOT_SERVING from now on; NOT_SERVING while draining."""
        self._serving[service] = serving
        self._notify()

    def drain(self) -> None:
        """Reports NOT_SERVING for everything, for good."""
        self._draining = True
        self._notify()

    def status(self, service: str) -> int:
        """The status as health.proto's enum; SERVICE_UNKNOWN for names that were never set."""
        if service == SERVICE:
            return int(_Status.SERVING)
        if service and service not in self._serving:
            return int(_Status.SERVICE_UNKNOWN)
        serving = self._serving[service] if service else all(self._serving.values())
        return int(_Status.SERVING if serving and not self._draining else _Status.NOT_SERVING)

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, _context: object
    ) -> health_pb2.HealthCheckResponse:
        """The status now. NOT_FOUND for an unknown service, as the health protocol says."""
        status = self.status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            raise NotFoundError(f"this server has no service {request.service!r}")
        return _Status(status=status)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, _context: object
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now, and again whenever it changes."""
        last: int | None = None
        while True:
            changed = self._changed
            status = self.status(request.service)
            if status != last:
                yield _Status(status=status)
            last = status
            await changed.wait()

    def _notify(self) -> None:
        for service in self._serving:
            serving = self.status(service) == _Status.SERVING
            metrics.RPC_SERVING.labels(service).set(int(serving))
        self._changed.set()
        self._changed = asyncio.Event()


async def is_serving(channel: grpc.aio.Channel, service: str = "", *, timeout: float = 2.0) -> bool:
    """Whether `service` reports SERVING within `timeout` seconds. Being unreachable counts as not serving."""
    stub = health_pb2_grpc.HealthStub(channel)
    check: Awaitable[health_pb2.HealthCheckResponse] = stub.Check(
        health_pb2.HealthCheckRequest(service=service), timeout=timeout, wait_for_ready=True
    )
    try:
        return bool((await check).status == _Status.SERVING)
    except (UnavailableError, DeadlineError, NotFoundError):
        return False


async def wait_serving(channel: grpc.aio.Channel, service: str = "", *, timeout: float) -> None:
    """Returns once `service` reports SERVING. Raises DeadlineError after `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout):
            while not await _watch_until_serving(channel, service):  # noqa: ASYNC110 - nothing here could set an event
                await asyncio.sleep(0.2)  # the watch broke: the service is starting, or went away
    except TimeoutError as error:
        raise DeadlineError(f"{service or 'the server'} was not ready within {timeout:g} s") from error


async def _watch_until_serving(channel: grpc.aio.Channel, service: str) -> bool:
    call = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service=service), wait_for_ready=True
    )
    try:
        async for response in call:
            if response.status == _Status.SERVING:
                return True
    except UnavailableError:
        return False
    except SurogateError as error:
        if error.reason != "UNIMPLEMENTED":
            raise
        return await is_serving(channel, service)
    finally:
        call.cancel()
    return False
