"""One worker as a child process, started again when it dies."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator_svc.launchers.base import HEALTH_SERVICE, READY_TIMEOUT, Worker, WorkerFailedError, WorkerSpec
from orchestrator_svc.metrics import WORKER_RESTARTS
from surogate.errors import DeadlineError, SurogateError, UnavailableError
from surogate.process import ServiceProcess, last_lines, start_service
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.rpc.health import wait_serving
from surogate.service import EXIT_USAGE
from surogate.telemetry.log import get_logger

if TYPE_CHECKING:
    import grpc.aio

_log = get_logger("launcher")
_LOG_LINES = 15
_LISTEN_SECONDS = 120.0


@dataclass(frozen=True)
class ChildCommand:
    """What to run."""

    module: str
    arguments: Sequence[str]
    environment: dict[str, str]
    listen: str
    log_file: Path


@dataclass(frozen=True)
class RestartPolicy:
    """When a dead child is started again."""

    max_restarts: int = 3
    """Restarts within `window` seconds before it is given up."""
    window: float = 600.0
    first_delay: float = 0.25
    """Seconds before the first restart; doubles with each further one, up to `max_delay`."""
    max_delay: float = 10.0

    def delay(self, restarts: int) -> float:
        """Seconds to wait before restart number `restarts`, from 1."""
        return float(min(self.max_delay, self.first_delay * 2 ** (restarts - 1)))


class ChildWorker(Worker):
    """A child process through its incarnations. `launch` starts a task that keeps it alive until `stop`."""

    def __init__(
        self,
        spec: WorkerSpec,
        command: ChildCommand,
        security: ClientSecurity,
        policy: RestartPolicy,
        stop_seconds: float,
        on_notice: Callable[[Worker, str], Awaitable[None]],
    ) -> None:
        super().__init__(spec.component, spec.index)
        self._command = command
        self._security = security
        self._policy = policy
        self._stop_seconds = stop_seconds
        self._on_notice = on_notice
        self._process: ServiceProcess | None = None
        self._channel: grpc.aio.Channel | None = None
        self._retired: list[grpc.aio.Channel] = []
        self._generation = 0
        self._restarts = 0
        self._recent: deque[float] = deque()
        self._was_ready = False
        self._failure: SurogateError | None = None
        self._changed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        return self._process.address if self._process else ""

    @property
    def security(self) -> ClientSecurity:
        return self._security

    @property
    def generation(self) -> int:
        return self._generation

    @property
    def restarts(self) -> int:
        return self._restarts

    @property
    def pid(self) -> int | None:
        """Process id of the current incarnation."""
        return self._process.process.pid if self._process else None

    async def channel(self) -> grpc.aio.Channel:
        if self._process is None:
            raise UnavailableError(f"{self.name} is not up", reason="WORKER_DOWN")
        if self._channel is None:
            self._channel = open_channel(self._process.address, self._security)
        return self._channel

    async def ready(self, timeout: float = READY_TIMEOUT) -> int:
        try:
            async with asyncio.timeout(timeout):
                while True:
                    changed = self._changed
                    if self._failure is not None:
                        raise self._failure
                    if self._process is not None and await self._serves_before(changed, timeout):
                        self._was_ready = True
                        return self._generation
                    await changed.wait()
        except TimeoutError:
            raise DeadlineError(f"{self.name} was not ready within {timeout:g} s{self._said()}") from None

    def launch(self) -> None:
        """Starts the process, and again when it dies."""
        self._keeper = asyncio.create_task(self._keep(), name=f"keep-{self.name}")

    async def stop(self) -> None:
        """Ends the process: SIGTERM, time to finish, SIGKILL to its group. Idempotent."""
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        if self._process is not None:
            await self._process.stop(self._stop_seconds)
        if self._failure is None:
            self._failure = WorkerFailedError(f"{self.name} was stopped", reason="WORKER_STOPPED")
        self._down()
        for channel in self._retired:
            await channel.close(None)

    async def _keep(self) -> None:
        try:
            while True:
                code = await self._live()
                self._down()
                self._failure = self._verdict(code)
                if self._failure is not None:
                    _log.error("worker given up", worker=self.name, exit_code=code)
                    self._notify()
                    return
                await self._prepare_restart(code)
        except Exception as error:  # noqa: BLE001 - logged, and told to whoever waits for the worker
            _log.exception("the keeper of a worker failed", worker=self.name)
            self._failure = WorkerFailedError(f"{self.name} could not be kept running: {error}")
            self._notify()

    async def _live(self) -> int:
        """One incarnation, to its end; returns its exit code (negative: the signal)."""
        command = self._command
        try:
            self._process = await start_service(
                command.module,
                command.arguments,
                log_file=command.log_file,
                token=self._security.token,
                environment=command.environment,
                timeout=_LISTEN_SECONDS,
                name=self.name,
                listen=command.listen,
            )
        except UnavailableError as error:
            return int(error.metadata.get("exit_code", "1"))
        except DeadlineError:
            return 1
        self._generation += 1
        _log.info("worker is up", worker=self.name, address=self.address, pid=self.pid, generation=self._generation)
        self._notify()
        code = await self._process.process.wait()
        await self._process.stop(0)  # whatever it started goes with it
        return code

    def _verdict(self, code: int) -> WorkerFailedError | None:
        """The error with which a dead worker is given up, or None if it is to be started again."""
        now = time.monotonic()
        while self._recent and now - self._recent[0] > self._policy.window:
            self._recent.popleft()
        how = _describe(code)
        if code == EXIT_USAGE:
            return WorkerFailedError(f"{self.name} refused its configuration{self._said()}")
        if code > 0 and not self._was_ready:
            return WorkerFailedError(f"{self.name} {how} before it was ready{self._said()}")
        if len(self._recent) >= self._policy.max_restarts:
            return WorkerFailedError(f"{self.name} {how} after {len(self._recent)} restarts{self._said()}")
        return None

    async def _prepare_restart(self, code: int) -> None:
        self._recent.append(time.monotonic())
        self._restarts += 1
        WORKER_RESTARTS.labels(self.component).inc()
        how = _describe(code)
        _log.warning("worker died", worker=self.name, how=how, restart=self._restarts)
        with suppress(SurogateError):  # a notice that cannot be stored must not keep the worker down
            await self._on_notice(self, f"{self.name} {how}; starting it again (restart {self._restarts})")
        await asyncio.sleep(self._policy.delay(len(self._recent)))

    async def _serves_before(self, changed: asyncio.Event, timeout: float) -> bool:
        """Whether the current incarnation answers SERVING before anything changes about it."""
        channel = await self.channel()
        serving = asyncio.create_task(wait_serving(channel, HEALTH_SERVICE[self.component], timeout=timeout))
        gone = asyncio.create_task(changed.wait())
        try:
            await asyncio.wait({serving, gone}, return_when=asyncio.FIRST_COMPLETED)
            return not gone.done() and serving.exception() is None
        finally:
            serving.cancel()
            gone.cancel()
            await asyncio.gather(serving, gone, return_exceptions=True)

    def _down(self) -> None:
        self._process = None
        self.policy_version = 0
        # Calls still open on it fail by themselves with UNAVAILABLE; closing it would cancel whoever awaits them.
        if self._channel is not None:
            self._retired.append(self._channel)
        self._channel = None
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _said(self) -> str:
        """The reason that the process gave, else its last log lines."""
        lines = last_lines(self._command.log_file, _LOG_LINES, 16_384).splitlines()
        complaint = max((i for i, line in enumerate(lines) if line.startswith("error: ")), default=None)
        if complaint is not None:
            said = "\n".join(lines[complaint:]).removeprefix("error: ")
            return f": {said} (log: {self._command.log_file})"
        return "; ".join(["", f"{self._command.log_file} ends with:\n" + "\n".join(lines)]) if lines else ""


def _describe(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
