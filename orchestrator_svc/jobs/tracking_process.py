"""The orchestrator's end: starts the tracking process of a job, passes on what it says, and sees it end."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from orchestrator_svc.jobs.context import JobContext
from orchestrator_svc.tracking.backends import INTERRUPTED
from orchestrator_svc.tracking.spec import Spec
from surogate.errors import SurogateError
from surogate.process import child_environment, last_lines, stop_process

FINISH_SECONDS = 60.0
"""Time that trackers have after a job's end to write out, or send, what is left."""

INTERRUPT_SECONDS = 10.0
"""The same when the orchestrator shuts down."""

MAX_NOTICES = 20


class Outcome:
    """How the job ended; set before the block of `tracking` ends."""

    def __init__(self) -> None:
        self.how = INTERRUPTED


@asynccontextmanager
async def tracking(ctx: JobContext) -> AsyncIterator[Outcome]:
    """Reports the job to the trackers that its configuration names, for the length of the block.

    Whatever goes wrong with them becomes a notice; it never fails the job.
    """
    outcome = Outcome()
    spec = Spec.of(ctx.job_id, ctx.config, ctx.output_dir)
    missing = spec.missing()
    if missing:
        await _notice(ctx, f"{', '.join(missing)} of report_to is not installed: pip install 'surogate[tracking]'")
        spec = spec.without(missing)
    if not spec.wanted:
        yield outcome
        return
    log = Path(ctx.output_dir) / "logs" / "tracking.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    process = await _start(spec, log)
    listening = asyncio.create_task(_listen(ctx, process))
    try:
        yield outcome
    finally:
        grace = INTERRUPT_SECONDS if outcome.how == INTERRUPTED else FINISH_SECONDS
        await asyncio.shield(_finish(ctx, process, listening, outcome.how, grace, log))


async def _start(spec: Spec, log: Path) -> asyncio.subprocess.Process:
    with log.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "orchestrator_svc.tracking",
            env=child_environment({"WANDB_SILENT": "true", "GIT_PYTHON_REFRESH": "quiet"}),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=file,
            start_new_session=True,
        )
    assert process.stdin is not None
    process.stdin.write(spec.line())
    with suppress(ConnectionError):  # it has died already, which is noticed below
        await process.stdin.drain()
    return process


async def _listen(ctx: JobContext, process: asyncio.subprocess.Process) -> None:
    """Passes on what the process says, up to a bound."""
    assert process.stdout is not None
    said = 0
    async for line in process.stdout:
        said += 1
        if said <= MAX_NOTICES:
            await _notice(ctx, line.decode(errors="replace").strip())


async def _finish(
    ctx: JobContext,
    process: asyncio.subprocess.Process,
    listening: asyncio.Task[None],
    how: str,
    grace: float,
    log: Path,
) -> None:
    """Tells the process how the job ended, and sees it end."""
    assert process.stdin is not None
    trackers = ", ".join(Spec.of(ctx.job_id, ctx.config, log).trackers)
    if how != INTERRUPTED:
        with suppress(SurogateError):
            await ctx.set_status(f"sending what is left to {trackers}")
    with suppress(ConnectionError):
        if how != INTERRUPTED:
            process.stdin.write(f"{how}\n".encode())
        process.stdin.close()
    try:
        code = await asyncio.wait_for(process.wait(), grace)
        problem = f"ended with exit code {code}: {last_lines(log, 1)}" if code else ""
    except TimeoutError:
        problem = f"did not finish within {grace:g} s and was stopped"
    await stop_process(process, grace=0.0)  # and whatever it started
    with suppress(TimeoutError):
        await asyncio.wait_for(listening, 5.0)
    if problem and how != INTERRUPTED:
        await _notice(ctx, f"what reports to {trackers} {problem}")


async def _notice(ctx: JobContext, text: str) -> None:
    with suppress(SurogateError):  # a notice that cannot be stored is in the log
        await ctx.notice(text, component="tracking")
