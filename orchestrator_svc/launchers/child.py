"""One worker as a child process, started again when it dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator_svc.launchers.base import Job, WorkerFailedError, WorkerSpec
from orchestrator_svc.launchers.files import follow_file
from orchestrator_svc.launchers.incarnations import RestartBudget, RestartedWorker, RestartPolicy
from orchestrator_svc.metrics import WORKER_RESTARTS
from surogate.errors import DeadlineError, SurogateError, UnavailableError
from surogate.process import ServiceProcess, last_lines, start_service
from surogate.rpc.channel import ClientSecurity
from surogate.service import EXIT_USAGE
from surogate.telemetry.log import get_logger

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


class ChildWorker(RestartedWorker):
    """A child process through its incarnations. `launch` starts a task that keeps it alive until `stop`."""

    def __init__(
        self,
        spec: WorkerSpec,
        command: ChildCommand,
        security: ClientSecurity,
        policy: RestartPolicy,
        stop_seconds: float,
        job: Job,
    ) -> None:
        super().__init__(spec.component, spec.index, security)
        self._command = command
        self._stop_seconds = stop_seconds
        self._job = job
        self._process: ServiceProcess | None = None
        self._budget = RestartBudget(policy, job, self.name)
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the current incarnation."""
        return self._process.process.pid if self._process else None

    async def log(self, tail: int, follow: bool) -> AsyncIterator[str]:
        file = self._command.log_file
        async with aclosing(follow_file(file, tail, lambda: not follow or self._failure is not None)) as lines:
            async for line in lines:
                yield line

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
        await self._closed()

    async def _keep(self) -> None:
        try:
            while True:
                code = await self._live()
                self._process = None
                self._went_down()
                if (failure := await self._verdict(code)) is not None:
                    _log.error("worker given up", worker=self.name, exit_code=code)
                    self._gave_up(failure)
                    return
                await self._prepare_restart(code)
        except Exception as error:  # noqa: BLE001 - logged, and told to whoever waits for the worker
            _log.exception("the keeper of a worker failed", worker=self.name)
            self._gave_up(WorkerFailedError(f"{self.name} could not be kept running: {error}"))

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
        self._came_up(self._process.address)
        _log.info("worker is up", worker=self.name, address=self.address, pid=self.pid, generation=self._generation)
        code = await self._process.process.wait()
        await self._process.stop(0)  # whatever it started goes with it
        return code

    async def _verdict(self, code: int) -> WorkerFailedError | None:
        """The error with which a dead worker is given up, or None if it is to be started again."""
        how = _describe(code)
        if code == EXIT_USAGE:
            return WorkerFailedError(f"{self.name} refused its configuration{self._said()}")
        if code > 0 and not self._was_ready:
            return WorkerFailedError(f"{self.name} {how} before it was ready{self._said()}")
        if await self._budget.spent():
            return WorkerFailedError(f"{self.name} {how} after {await self._budget.used()} restarts{self._said()}")
        return None

    async def _prepare_restart(self, code: int) -> None:
        delay = await self._budget.take()
        self._restarts += 1
        WORKER_RESTARTS.labels(self.component).inc()
        how = _describe(code)
        _log.warning("worker died", worker=self.name, how=how, restart=self._restarts)
        with suppress(SurogateError):  # a notice that cannot be stored must not keep the worker down
            await self._job.notice(
                f"{self.name} {how}; starting it again (restart {self._restarts})", component=self.name
            )
        await asyncio.sleep(delay)

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
