"""What workers that are started again have in common: a channel to the one that is up, and waiting for the next."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator_svc.launchers.base import HEALTH_SERVICE, READY_TIMEOUT, Component, Job, WorkerFailedError
from orchestrator_svc.launchers.connected import ConnectedWorker
from surogate.errors import DeadlineError, SurogateError
from surogate.rpc.channel import ClientSecurity
from surogate.rpc.health import wait_serving
from surogate.telemetry.log import get_logger

if TYPE_CHECKING:
    import grpc.aio

_log = get_logger("launcher")


@dataclass(frozen=True)
class RestartPolicy:
    """When a dead worker is started again."""

    max_restarts: int = 3
    """Restarts within `window` seconds before it is given up."""
    window: float = 600.0
    first_delay: float = 0.25
    """Seconds before the first restart; doubles with each further one, up to `max_delay`."""
    max_delay: float = 10.0

    def delay(self, restarts: int) -> float:
        """Seconds to wait before restart number `restarts`, from 1."""
        return float(min(self.max_delay, self.first_delay * 2 ** (restarts - 1)))


class RestartBudget:
    """Counts the restarts of one worker against its policy, over restarts of the orchestrator too."""

    def __init__(self, policy: RestartPolicy, job: Job, worker: str) -> None:
        self._policy = policy
        self._job = job
        self._worker = worker
        self._recent: list[float] = []
        self._loaded = False

    async def used(self) -> int:
        """Restarts within the window that ends now."""
        since = time.time() - self._policy.window
        await self._load(since)
        self._recent = [when for when in self._recent if when > since]
        return len(self._recent)

    async def spent(self) -> bool:
        """Whether one more restart is too many."""
        return await self.used() >= self._policy.max_restarts

    async def take(self) -> float:
        """Counts a restart; returns the seconds to wait before it."""
        used, now = await self.used() + 1, time.time()
        self._recent.append(now)
        try:
            await self._job.add_restart(self._worker, now, now - self._policy.window)
        except SurogateError as error:  # a store that is away must not keep the worker down
            _log.warning("a restart could not be written down", worker=self._worker, error=str(error))
        return self._policy.delay(used)

    async def _load(self, since: float) -> None:
        """What was counted before this orchestrator, as soon as the store tells."""
        if self._loaded:
            return
        try:
            self._recent = [*await self._job.recent_restarts(self._worker, since), *self._recent]
            self._loaded = True
        except SurogateError as error:
            _log.warning("earlier restarts are not known", worker=self._worker, error=str(error))


class RestartedWorker(ConnectedWorker):
    """A worker whose keeper says `_came_up`, `_went_down` and, when it will not come back, `_gave_up`."""

    def __init__(self, component: Component, index: int, security: ClientSecurity) -> None:
        super().__init__(component, index, security)
        self._retired: list[grpc.aio.Channel] = []
        self._restarts = 0
        self._was_ready = False
        self._failure: SurogateError | None = None
        self._changed = asyncio.Event()

    @property
    def restarts(self) -> int:
        return self._restarts

    async def ready(self, timeout: float = READY_TIMEOUT) -> int:
        left = timeout
        while left > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    return await self._ready(timeout)
            left = self._excused() + timeout - time.monotonic()
        doing = f": {self.status_message}" if self.status_message else ""
        raise DeadlineError(f"{self.name} was not ready within {timeout:g} s{doing}{self._said()}")

    async def _ready(self, timeout: float) -> int:
        while True:
            changed = self._changed
            if self._failure is not None:
                raise self._failure
            if self._address and await self._serves_before(changed, timeout):
                self._was_ready = True
                return self._generation
            await changed.wait()

    def _excused(self) -> float:
        """Until when, by the monotonic clock, it could not have been ready for reasons of others; the time to be ready
        in begins there."""
        return float("-inf")

    def _said(self) -> str:
        """What the worker said last, to go behind a message about it; empty if nothing is known."""
        return ""

    def _came_up(self, address: str) -> None:
        self._generation += 1
        self._address = address
        self._notify()

    def _went_down(self) -> None:
        self._address = ""
        self.policy_version = 0
        # Calls still open on it fail by themselves with UNAVAILABLE; closing it would cancel whoever awaits them.
        if self._channel is not None:
            self._retired.append(self._channel)
        self._channel = None
        self._notify()

    def _gave_up(self, failure: SurogateError) -> None:
        self._failure = failure
        self._notify()

    async def _closed(self) -> None:
        """Ends the worker for those who wait for it, and closes its channels."""
        if self._failure is None:
            self._failure = WorkerFailedError(f"{self.name} was stopped", reason="WORKER_STOPPED")
        self._went_down()
        for channel in self._retired:
            await channel.close(None)
        self._retired.clear()

    async def _serves_before(self, changed: asyncio.Event, timeout: float) -> bool:
        """Whether the current incarnation answers SERVING before anything changes about it."""
        channel = await self.channel()
        serving = asyncio.create_task(self._serving(channel, timeout))
        gone = asyncio.create_task(changed.wait())
        try:
            await asyncio.wait({serving, gone}, return_when=asyncio.FIRST_COMPLETED)
            return not gone.done() and serving.exception() is None
        finally:
            serving.cancel()
            gone.cancel()
            await asyncio.gather(serving, gone, return_exceptions=True)

    async def _serving(self, channel: grpc.aio.Channel, timeout: float) -> None:
        """Returns once the service can be used. Raises DeadlineError after `timeout` seconds."""
        await wait_serving(channel, HEALTH_SERVICE[self.component], timeout=timeout)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
