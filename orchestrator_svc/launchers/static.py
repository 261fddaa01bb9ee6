"""Workers that already run, at addresses that somebody configured."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from orchestrator_svc.launchers.base import (
    HEALTH_SERVICE,
    READY_TIMEOUT,
    Component,
    Job,
    Launcher,
    Worker,
    WorkerFailedError,
    WorkerPool,
    WorkerSpec,
)
from orchestrator_svc.launchers.connected import ConnectedWorker
from surogate.errors import DeadlineError, FailedPreconditionError, SurogateError
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.rpc.health import wait_serving
from surogate.telemetry.log import get_logger
from surogate.v1 import trainer_pb2, trainer_pb2_grpc

if TYPE_CHECKING:
    from orchestrator_svc.settings import OrchestratorSettings

_log = get_logger("launcher")
_REAP_SECONDS = 30.0


class StaticLauncher(Launcher):
    """Hands out configured addresses. Tokens and certificates come from the environment (`ClientSecurity.from_env`)."""

    def __init__(self, settings: OrchestratorSettings) -> None:
        self._settings = settings
        self._security = ClientSecurity.from_env()

    async def open(self, job: Job) -> WorkerPool:
        addresses: dict[Component, list[str]] = {
            "trainer": [self._settings.trainer_address] if self._settings.trainer_address else [],
            "inference": job_addresses(job) or list(self._settings.inference_addresses),
            "reward": [self._settings.reward_address] if self._settings.reward_address else [],
        }
        return StaticPool(addresses, self._security, self._settings.worker_wait)

    async def reap(self, job_id: str, uid: str) -> None:
        """Ends the session that the job may still have on the trainer."""
        if not self._settings.trainer_address:
            return
        channel = open_channel(self._settings.trainer_address, self._security)
        try:
            request = trainer_pb2.DeleteSessionRequest(session_id=job_id)
            await trainer_pb2_grpc.TrainerServiceStub(channel).DeleteSession(request, timeout=_REAP_SECONDS)
        except SurogateError as error:
            _log.info("no session to end", job=job_id, why=error.reason)
        finally:
            await channel.close(None)


class StaticPool(WorkerPool):
    """The configured addresses, as the workers of one job."""

    ends_workers = False

    def __init__(self, addresses: dict[Component, list[str]], security: ClientSecurity, worker_wait: float) -> None:
        self._addresses = addresses
        self._security = security
        self._worker_wait = worker_wait
        self._workers: list[StaticWorker] = []

    @property
    def workers(self) -> Sequence[Worker]:
        return self._workers

    def count(self, component: Component, wanted: int) -> int:
        return len(self._require(component))

    async def start(self, spec: WorkerSpec) -> Worker:
        addresses = self._require(spec.component)
        if spec.index >= len(addresses):
            raise FailedPreconditionError(
                f"there are {len(addresses)} {spec.component} addresses, not {spec.index + 1}"
            )
        worker = StaticWorker(spec.component, spec.index, addresses[spec.index], self._security, self._worker_wait)
        self._workers.append(worker)
        worker.follow()
        return worker

    async def stop(self) -> None:
        await asyncio.gather(*(worker.close() for worker in self._workers))

    def _require(self, component: Component) -> list[str]:
        addresses = self._addresses[component]
        if not addresses:
            setting = {"trainer": "trainer_address", "inference": "inference_addresses", "reward": "reward_address"}
            hint = " or orch.client.base_url" if component == "inference" else ""
            raise FailedPreconditionError(
                f"the job needs {component}, and the static launcher knows no address: set {setting[component]}{hint}",
                reason="NO_WORKER_ADDRESS",
            )
        return addresses


class StaticWorker(ConnectedWorker):
    """A service that somebody else runs. That it was away is seen by health checks; it counts as a new incarnation."""

    def __init__(
        self, component: Component, index: int, address: str, security: ClientSecurity, worker_wait: float
    ) -> None:
        super().__init__(component, index, security, address=address, generation=1)
        self._worker_wait = worker_wait
        self._follower: asyncio.Task[None] | None = None

    @property
    def restarts(self) -> int:
        return self._generation - 1

    async def ready(self, timeout: float = READY_TIMEOUT) -> int:
        channel = await self.channel()
        patience = min(timeout, self._worker_wait)
        try:
            await wait_serving(channel, HEALTH_SERVICE[self.component], timeout=patience)
        except DeadlineError as error:
            message = f"{self.name} at {self._address} was not ready within {patience:g} s: does it run there?"
            if patience < timeout:
                raise WorkerFailedError(message) from error
            raise DeadlineError(message) from error
        return self._generation

    def follow(self) -> None:
        """Begins to watch whether the service goes away."""
        self._follower = asyncio.create_task(self._follow(), name=f"follow-{self.name}")

    async def close(self) -> None:
        """Stops watching and closes the channel; the service goes on."""
        if self._follower is not None:
            self._follower.cancel()
            with suppress(asyncio.CancelledError):
                await self._follower
        if self._channel is not None:
            await self._channel.close(None)
            self._channel = None

    async def _follow(self) -> None:
        """Counts incarnations: whenever the connection broke and came back, it may be another process."""
        channel = await self.channel()
        seen = False
        while True:
            await channel.channel_ready()
            if seen:
                self._generation += 1
                _log.warning("worker is back", worker=self.name, address=self._address, generation=self._generation)
            seen = True
            await self._gone(channel)

    async def _gone(self, channel: grpc.aio.Channel) -> None:
        """Returns when the service cannot be reached any more."""
        try:
            async for _ in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
                pass
        except SurogateError as error:
            if error.reason != "UNIMPLEMENTED":
                return
        while channel.get_state() == grpc.ChannelConnectivity.READY:
            await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)


def job_addresses(job: Job) -> list[str]:
    """Inference addresses that the job itself names in `orch.client.base_url`: HOST:PORT, or URLs with it."""
    config = job.config
    if config.kind != "grpo" or config.orch.client is None:
        return []
    given = config.orch.client.base_url or []
    urls = [given] if isinstance(given, str) else list(given)
    return [url.removeprefix("http://").removeprefix("https://").partition("/")[0] for url in urls]
