"""What the workers of a job have written: their logs as files in the job's folder, or from where they run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator_svc.launchers.files import follow_file
from surogate.errors import NotFoundError, SurogateError
from surogate.v1 import job_pb2

if TYPE_CHECKING:
    from orchestrator_svc.launchers.base import WorkerPool

FOLDER = "logs"
"""Within the job's folder: `<worker>.log`."""

_Lines = Callable[[], AsyncIterator[str]]
_WAITING = 1024
"""Lines that may wait for a slow reader; workers are read no faster."""


async def read_logs(
    pool: WorkerPool | None, folder: Path, component: str, tail: int, follow: bool
) -> AsyncGenerator[job_pb2.LogLine, None]:
    """The last lines of each worker's log, and new ones with `follow`, until the workers have ended.

    Args:
        pool: The workers, if the job runs in this orchestrator; else what they left in files is read.
        folder: The job's folder.
        component: `inference` for all of a component, `inference-1` for one; empty for all.
        tail: Lines of each to begin with.
        follow: Whether to go on with what is written from then on.

    Raises:
        NotFoundError: There is no such worker, or it has no log.
    """
    sources = await asyncio.to_thread(_files, folder, tail)
    if pool is not None:
        sources |= {worker.name: partial(worker.log, tail, follow) for worker in pool.workers}
    wanted = {name: lines for name, lines in sources.items() if component in ("", name, name.rpartition("-")[0])}
    if not wanted:
        there = ", ".join(sorted(sources)) or "none"
        raise NotFoundError(f"no worker {component!r} has a log; there are: {there}", reason="NO_LOG")
    async with aclosing(_merged(wanted)) as lines:
        async for line in lines:
            yield line


def _files(folder: Path, tail: int) -> dict[str, _Lines]:
    found = sorted((folder / FOLDER).glob("*-*.log"))
    return {file.stem: partial(follow_file, file, tail, lambda: True) for file in found}


async def _merged(sources: dict[str, _Lines]) -> AsyncGenerator[job_pb2.LogLine, None]:
    """Lines of several logs as they come."""
    queue: asyncio.Queue[job_pb2.LogLine | None] = asyncio.Queue(_WAITING)

    async def read(name: str, lines: _Lines) -> None:
        try:
            async for line in lines():
                await queue.put(job_pb2.LogLine(worker=name, text=line))
        except SurogateError as error:
            await queue.put(job_pb2.LogLine(worker=name, text=f"[no more: {error}]"))
        await queue.put(None)

    tasks: Sequence[asyncio.Task[None]] = [asyncio.create_task(read(*item)) for item in sources.items()]
    try:
        left = len(tasks)
        while left:
            line = await queue.get()
            if line is None:
                left -= 1
            else:
                yield line
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
