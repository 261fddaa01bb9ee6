"""A worker process: starting it, hearing it out, and saying how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence

from surogate.errors import InternalError
from surogate.internal.v1 import worker_pb2 as worker
from surogate.process import child_environment
from trainer_svc.worker_client import WorkerClient

WORKER_COMMAND = (sys.executable, "-m", "trainer_svc.worker")
"""What a worker is started with; `--fd N` follows."""

_TAIL_BYTES = 16_384
_TAIL_LINES = 20
_LAST_WORDS_SECONDS = 2.0
"""How long output and messages are waited for after the process has ended; what it started may hold the pipe open."""


class WorkerProcess:
    """One rank's process and the connection to it. Make one with `start_worker`."""

    def __init__(self, process: asyncio.subprocess.Process, client: WorkerClient, output: asyncio.StreamReader) -> None:
        self._process = process
        self._output = output
        self.client = client
        """Where commands go."""
        self._tail = b""
        self._stopping = False
        self._forwarding = asyncio.create_task(self._forward(), name="worker output")

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def exited(self) -> None:
        """Waits until the process has ended."""
        await self._process.wait()

    async def kill(self, grace: float = 0.0) -> None:
        """Ends the process, and what it started, with SIGKILL unless it ends by itself within `grace` seconds.

        Afterwards everything it said has been read.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(self.client.closed(), self._forwarding), _LAST_WORDS_SECONDS)
        await self.client.close()

    def death(self) -> InternalError:
        """Why the process ended, for people: exit code or signal, and the last lines it wrote."""
        code = self._process.returncode
        assert code is not None
        lines = self._tail.decode(errors="replace").strip().splitlines()[-_TAIL_LINES:]
        said = "\nIts last output:\n" + "\n".join(lines) if lines else ""
        metadata = {"exit_code": str(code)} if code >= 0 else {"signal": signal.Signals(-code).name}
        message = f"the training worker {_describe(code)}{said}"
        return InternalError(message, reason="WORKER_DIED", metadata=metadata)

    async def _forward(self) -> None:
        while chunk := await self._output.read(_TAIL_BYTES):
            sys.stderr.write(chunk.decode(errors="replace"))
            sys.stderr.flush()
            self._tail = (self._tail + chunk)[-_TAIL_BYTES:]


async def start_worker(
    on_event: Callable[[worker.WorkerEvent], None],
    *,
    command: Sequence[str] = WORKER_COMMAND,
) -> WorkerProcess:
    """Starts the worker of rank 0 with one end of a socket pair, in a session and process group of its own.

    The environment names rank and world the way torchrun does, so that a worker does not care who started it.
    """
    ours, theirs = socket.socketpair()
    # A pipe of our own: asyncio's would keep `wait` waiting for as long as some grandchild holds the other end.
    read_output, write_output = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            "--fd",
            str(theirs.fileno()),
            pass_fds=(theirs.fileno(),),
            env=child_environment(_rank_environment()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=write_output,
            stderr=write_output,
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        os.close(read_output)
        raise
    finally:
        theirs.close()
        os.close(write_output)
    return WorkerProcess(process, await WorkerClient.connect(ours, on_event), await _reader(read_output))


async def _reader(fd: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb"))
    return reader


def _rank_environment() -> dict[str, str]:
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    return {**rank, "MASTER_PORT": str(_free_port()), "PYTHONUNBUFFERED": "1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _describe(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    if -code == signal.SIGKILL:
        return "was killed by SIGKILL; that is what the kernel does to it when memory runs out"
    return f"was killed by {signal.Signals(-code).name}"
