"""Worker processes that answer JSON lines and are killed when they are late: for work that cannot be interrupted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from surogate.errors import DeadlineError, InternalError, UnavailableError
from surogate.process import PARENT_PID

START_SECONDS = 60.0
"""Time that a worker may take to import what it needs."""

_KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG")
"""Variables of the service that workers get: enough to import, and no tokens."""


class WorkerPool:
    """Up to `size` processes of `python -m module`, started as they are needed, each with one request at a time.

    All methods but `close` belong to one event loop.
    """

    def __init__(self, module: str, size: int) -> None:
        self.size = size
        self._module = module
        self._idle: list[asyncio.subprocess.Process] = []
        self._alive: set[asyncio.subprocess.Process] = set()
        self._room = asyncio.Semaphore(size)

    async def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The answer of a worker. Raises DeadlineError after `seconds`, and InternalError if the worker dies: either
        way it is replaced."""
        async with self._room:
            worker = self._idle.pop() if self._idle else await self._start()
            try:
                answer = await _exchange(worker, request, seconds)
            except BaseException:
                await self._kill(worker)
                raise
            self._idle.append(worker)
            return answer

    def close(self) -> None:
        """Kills the workers."""
        for worker in self._alive:
            if worker.returncode is None:
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)

    async def _start(self) -> asyncio.subprocess.Process:
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        worker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**environment, PARENT_PID: str(os.getpid())},
            start_new_session=True,
        )
        self._alive.add(worker)
        try:
            await _exchange(worker, {}, START_SECONDS)
        except InternalError as error:
            await self._kill(worker)
            raise UnavailableError(f"a worker ({self._module}) does not start: {error}") from error
        except BaseException:
            await self._kill(worker)
            raise
        return worker

    async def _kill(self, worker: asyncio.subprocess.Process) -> None:
        self._alive.discard(worker)
        if worker.returncode is None:
            with suppress(ProcessLookupError):
                worker.kill()
        await worker.wait()


async def _exchange(worker: asyncio.subprocess.Process, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    assert worker.stdin is not None and worker.stdout is not None
    try:
        async with asyncio.timeout(seconds):
            worker.stdin.write(json.dumps(request).encode() + b"\n")
            await worker.stdin.drain()
            line = await worker.stdout.readline()
    except TimeoutError as error:
        raise DeadlineError(f"it took longer than {seconds:g} s") from error
    except ConnectionError as error:
        raise InternalError("the worker ended") from error
    if not line.endswith(b"\n"):
        raise InternalError(f"the worker ended with {await worker.wait()}")
    answer = json.loads(line)
    assert isinstance(answer, dict)
    return answer
