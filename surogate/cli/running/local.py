"""An orchestrator of one's own: a child process that ends with the command, and is started again if it dies."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from surogate.cli.exits import usage
from surogate.cli.running.follow import Source
from surogate.client.aio import AsyncClient
from surogate.errors import FailedPreconditionError, UnavailableError
from surogate.process import ServiceProcess, last_lines, start_service
from surogate.rpc.channel import ClientSecurity

STATE_FOLDER = ".surogate"
"""Folder in a job's output folder with the job store, by which an interrupted job goes on."""

_MAX_RESTARTS = 5
_WINDOW_SECONDS = 600.0
_EXIT_GRACE = 5.0
_STOP_SECONDS = 30.0

_ONE_USER = ("--custom-modules", '["*"]', "--token-variables", '["*"]')
"""The orchestrator serves whoever started it: the jobs' code and variables are that person's own."""


class LocalOrchestrator(Source):
    """Runs `python -m orchestrator_svc` with the `local` launcher on a store in the job's output folder."""

    patience = 0.0

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir
        self._log_file = output_dir / "logs" / "orchestrator.log"
        self._token = secrets.token_urlsafe(32)
        self._process: ServiceProcess | None = None
        self._client: AsyncClient | None = None
        self._restarts: list[float] = []
        self._changing = asyncio.Lock()

    async def client(self) -> AsyncClient:
        """The client of the running orchestrator, which is started if there is none."""
        async with self._changing:
            if self._client is None:
                await self._start()
            assert self._client is not None
            return self._client

    async def recover(self, error: UnavailableError) -> str:
        """Starts a dead orchestrator again; one that lives is given a moment. Raises after 5 times in 10 minutes."""
        async with self._changing:
            if self._process is None:
                return "the orchestrator was started again"
            now = time.monotonic()
            self._restarts = [*(at for at in self._restarts if now - at < _WINDOW_SECONDS), now]
            if len(self._restarts) > _MAX_RESTARTS:
                raise UnavailableError(
                    f"the orchestrator died or was out of reach {_MAX_RESTARTS + 1} times in "
                    f"{_WINDOW_SECONDS / 60:.0f} minutes; {self._log_file} ends with:\n{last_lines(self._log_file)}"
                ) from error
            code = await self._exit_code()
            if code is None:
                return f"the orchestrator is out of reach ({error.message}); trying again"
            await self._close()
            return f"the orchestrator ended (exit code {code}); starting it again"

    async def stop(self, grace: float = _STOP_SECONDS) -> None:
        """Ends the orchestrator and, through it, the workers: SIGTERM, after `grace` seconds SIGKILL."""
        async with self._changing:
            await self._close(grace)

    async def _start(self) -> None:
        store = self._output_dir / STATE_FOLDER / "jobs.db"
        self._process = await start_service(
            "orchestrator_svc",
            ["--launcher", "local", "--store-url", f"sqlite:///{store}", *_ONE_USER],
            log_file=self._log_file,
            token=self._token,
            name="orchestrator",
        )
        self._client = AsyncClient(self._process.address, ClientSecurity(token=self._token))

    async def _exit_code(self) -> int | None:
        assert self._process is not None
        try:
            return await asyncio.wait_for(self._process.process.wait(), _EXIT_GRACE)
        except TimeoutError:
            return None

    async def _close(self, grace: float = _STOP_SECONDS) -> None:
        client, process = self._client, self._process
        self._client = self._process = None
        if client is not None:
            await client.close()
        if process is not None:
            await process.stop(grace)


@asynccontextmanager
async def local_orchestrator(output_dir: Path) -> AsyncIterator[LocalOrchestrator]:
    """An orchestrator for a job in `output_dir`, which no other command may use meanwhile; stopped at the end."""
    with _locked(output_dir):
        orchestrator = LocalOrchestrator(output_dir)
        try:
            yield orchestrator
        finally:
            await orchestrator.stop()


@contextmanager
def _locked(output_dir: Path) -> Iterator[None]:
    folder = output_dir / STATE_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise usage("output_dir", f"cannot write in {output_dir}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise FailedPreconditionError(
            f"another surogate command trains in {output_dir}: wait for it, stop it, or set another output_dir"
        ) from None
    try:
        yield
    finally:
        os.close(lock)  # which also unlocks
