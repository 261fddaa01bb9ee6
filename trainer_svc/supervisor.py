"""Worker processes, one a rank: starting them, hearing them out, and saying how they ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence

from surogate.errors import InternalError, SurogateError
from surogate.internal.v1 import worker_pb2 as worker
from surogate.process import child_environment
from trainer_svc.rank_plan import RankPlan
from trainer_svc.worker_client import WorkerClient
from trainer_svc.worker_protocol import EXIT_PEER_LOST, PEER_LOST

WORKER_COMMAND = (sys.executable, "-m", "trainer_svc.worker")
"""What a worker is started with; for rank 0 `--fd N` follows."""

ONE = RankPlan()
"""One process."""

_TAIL_BYTES = 16_384
_TAIL_LINES = 20
_LAST_WORDS_SECONDS = 2.0
"""How long output and messages are waited for after the process has ended; what it started may hold the pipe open."""

_CAUSE_SECONDS = 5.0
"""How long the end of one rank is waited for that explains why others have lost it."""

_POLL_SECONDS = 0.05


class RankProcess:
    """One rank's process."""

    def __init__(self, process: asyncio.subprocess.Process, rank: int, output: asyncio.StreamReader) -> None:
        self._process = process
        self._rank = rank
        self._output = output
        self._tail = b""
        self._forwarding = asyncio.create_task(self._forward(), name="worker output")

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """How it ended: its exit code, or minus the signal that killed it; None while it runs."""
        return self._process.returncode

    async def exited(self) -> None:
        """Waits until the process has ended."""
        await self._process.wait()

    async def kill(self) -> None:
        """Ends the process, and what it started, with SIGKILL. Afterwards everything it wrote has been read."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._forwarding), _LAST_WORDS_SECONDS)

    def death(self, code: int, *, alone: bool) -> InternalError:
        """Why the process ended, for people: exit code or signal, and the last lines it wrote."""
        lines = self._tail.decode(errors="replace").strip().splitlines()[-_TAIL_LINES:]
        said = "\nIts last output:\n" + "\n".join(lines) if lines else ""
        metadata = {"exit_code": str(code)} if code >= 0 else {"signal": signal.Signals(-code).name}
        which = "" if alone else f" of rank {self._rank}"
        message = f"the training worker{which} {_describe(code)}{said}"
        return InternalError(message, reason="WORKER_DIED", metadata={**metadata, "rank": str(self._rank)})

    async def _forward(self) -> None:
        while chunk := await self._output.read(_TAIL_BYTES):
            sys.stderr.write(chunk.decode(errors="replace"))
            sys.stderr.flush()
            self._tail = (self._tail + chunk)[-_TAIL_BYTES:]


class WorkerGroup:
    """The processes of this node's ranks, and the connection to rank 0. Make one with `start_workers`."""

    def __init__(self, ranks: Sequence[RankProcess], client: WorkerClient) -> None:
        self._ranks = ranks
        self.client = client
        """Where commands go."""
        self._codes: list[int | None] = []

    @property
    def pid(self) -> int:
        """Process id of rank 0."""
        return self._ranks[0].pid

    async def exited(self) -> None:
        """Waits until rank 0 has ended, or another one has without having been told to."""
        waits = {asyncio.create_task(process.exited()): process for process in self._ranks}
        try:
            while waits:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                ended = [waits.pop(task) for task in done]
                if any(process is self._ranks[0] or process.code != 0 for process in ended):
                    return
        finally:
            for task in waits:
                task.cancel()

    async def kill(self, grace: float = 0.0) -> None:
        """Ends the processes, and what they started, with SIGKILL unless they end by themselves within `grace` seconds.

        Ranks that have only lost another one are given a moment for the cause to show. Afterwards everything they said
        has been read.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_exited(), grace)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._cause_shows(), _CAUSE_SECONDS)
        self._codes = [process.code for process in self._ranks]
        await asyncio.gather(*(process.kill() for process in self._ranks))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.client.closed(), _LAST_WORDS_SECONDS)
        await self.client.close()

    def cause(self) -> SurogateError:
        """Why they ended, once they have: what rank 0 reported, or the end of the first that fell by itself."""
        fatal = self.client.fatal
        if fatal is not None and fatal.reason != PEER_LOST:
            return fatal
        codes = self._codes or [process.code for process in self._ranks]
        fallen = [rank for rank, code in enumerate(codes) if code not in (None, 0, EXIT_PEER_LOST)]
        if not fallen and fatal is not None:
            return fatal
        # Of those that fell, one that was killed explains more than one that gave up.
        first = min(fallen or [0], key=lambda rank: ((codes[rank] or 0) > 0, rank))
        code = codes[first] if codes[first] is not None else self._ranks[first].code
        assert code is not None
        return self._ranks[first].death(code, alone=len(self._ranks) == 1)

    async def _all_exited(self) -> None:
        await asyncio.gather(*(process.exited() for process in self._ranks))

    async def _cause_shows(self) -> None:
        """Waits while all that is known is that some have lost another."""
        while len(self._ranks) > 1:
            fatal, codes = self.client.fatal, [process.code for process in self._ranks]
            lost = (fatal is not None and fatal.reason == PEER_LOST) or EXIT_PEER_LOST in codes
            gave_up = any(code not in (None, 0, EXIT_PEER_LOST) and code > 0 for code in codes)
            killed = any(code is not None and code < 0 for code in codes)
            reported = fatal is not None and fatal.reason != PEER_LOST
            if killed or reported or not (lost or gave_up):
                return
            await asyncio.sleep(_POLL_SECONDS)


async def start_workers(
    on_event: Callable[[worker.WorkerEvent], None],
    *,
    command: Sequence[str] = WORKER_COMMAND,
    ranks: RankPlan = ONE,
) -> WorkerGroup:
    """Starts the ranks of this node, each in a session and process group of its own; rank 0 with the socket to us.

    The environment names rank and world the way torchrun does, so that a worker does not care who started it.
    """
    ours, theirs = socket.socketpair()
    started: list[RankProcess] = []
    try:
        for rank, environment in enumerate(ranks.environments()):
            started.append(await start_rank(command, rank, environment, theirs.fileno() if rank == 0 else None))
    except BaseException:
        ours.close()
        for process in started:
            await process.kill()
        raise
    finally:
        theirs.close()
    return WorkerGroup(started, await WorkerClient.connect(ours, on_event))


async def start_rank(command: Sequence[str], rank: int, environment: Mapping[str, str], fd: int | None) -> RankProcess:
    """Starts one rank's process. `fd`: the socket that it inherits."""
    # A pipe of our own: asyncio's would keep `wait` waiting for as long as some grandchild holds the other end.
    read_output, write_output = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            *(() if fd is None else ("--fd", str(fd))),
            pass_fds=() if fd is None else (fd,),
            env=child_environment(environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=write_output,
            stderr=write_output,
            start_new_session=True,
        )
    except BaseException:
        os.close(read_output)
        raise
    finally:
        os.close(write_output)
    return RankProcess(process, rank, await _reader(read_output))


async def _reader(fd: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb"))
    return reader


def _describe(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    if -code == signal.SIGKILL:
        return "was killed by SIGKILL; that is what the kernel does to it when memory runs out"
    return f"was killed by {signal.Signals(-code).name}"
