"""Launches a job, on a server or on this machine, and follows it to its end."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from surogate.cli.exits import FAILED, INTERRUPTED, OK, reaching, report
from surogate.cli.running.display import Display, PlainDisplay
from surogate.cli.running.follow import Remote, Source, cancel_job, follow_job
from surogate.cli.running.interrupts import Interrupts
from surogate.cli.running.local import LocalOrchestrator, local_orchestrator
from surogate.cli.running.plan import plan
from surogate.cli.running.progress import Progress
from surogate.client import AsyncClient, has_ended
from surogate.client.jobs import ENDED, train_keys
from surogate.errors import SurogateError
from surogate.v1 import job_pb2

T = TypeVar("T")

START_ORCHESTRATOR = "surogate serve orchestrator --listen HOST:PORT"
_UNFINISHED = [state for state in job_pb2.Job.State.values() if state not in ENDED and state]


@dataclass(frozen=True)
class Launch:
    """What to launch. `config` is that of `job_config`; `output_dir` is set for a job on this machine only."""

    config: Mapping[str, Any]
    job_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


def launch_remote(launch: Launch, server: str, *, detach: bool) -> int:
    """Submits the job to `server`; returns the exit code: at once with `detach`, else when it has ended."""
    return asyncio.run(_remote(launch, server, detach=detach))


def follow_remote(server: str, job: str, *, after_sequence: int = 0) -> int:
    """Follows a job that runs on `server`; returns the exit code."""

    async def follow() -> int:
        async with AsyncClient(server) as client:
            with reaching("orchestrator", server, START_ORCHESTRATOR):
                found = await client.get_job(job)
                return await _follow_remote(client, server, found, after_sequence=after_sequence)

    return asyncio.run(follow())


def launch_local(launch: Launch, output_dir: Path) -> int:
    """Runs the job with an orchestrator and workers of its own on this machine; returns the exit code."""
    return asyncio.run(_local(launch, output_dir))


async def _remote(launch: Launch, server: str, *, detach: bool) -> int:
    async with AsyncClient(server) as client:
        with reaching("orchestrator", server, START_ORCHESTRATOR):
            job = await client.create_job(launch.config, job_id=launch.job_id, labels=launch.labels)
            _warn(job)
            if detach:
                sys.stdout.write(f"{job.name}\n")
                return OK
            return await _follow_remote(client, server, job)


async def _follow_remote(client: AsyncClient, server: str, submitted: job_pb2.Job, *, after_sequence: int = 0) -> int:
    name = submitted.name
    progress = Progress(last_sequence=after_sequence)
    display = _make_display()
    with Interrupts().listening() as interrupts:
        try:
            display.say(name)
            display.say(plan(submitted))
            job = await _until(interrupts.asked, follow_job(Remote(client), name, progress, display))
        finally:
            display.close()
    if job is None:
        short = name.removeprefix("jobs/")
        sys.stderr.write(
            f"{name} goes on without this command. Follow it: surogate jobs watch {short} --server {server}. "
            f"Stop it: surogate jobs cancel {short} --server {server}\n"
        )
        return INTERRUPTED
    return _finish(job, progress, local=False)


async def _local(launch: Launch, output_dir: Path) -> int:
    progress = Progress()
    with Interrupts().listening() as interrupts:
        async with local_orchestrator(output_dir) as orchestrator:
            submitted = await _until(interrupts.asked, _submit_local(orchestrator, launch))
            if submitted is None:
                return INTERRUPTED
            _warn(submitted)
            display = _make_display()
            try:
                display.say(f"{submitted.name}, output in {submitted.output_dir}")
                display.say(plan(submitted))
                job = await _follow_local(orchestrator, submitted.name, progress, display, interrupts)
            finally:
                display.close()
    if job is None:
        sys.stderr.write("stopped at once; what was done since the last checkpoint is lost\n")
        return INTERRUPTED
    code = _finish(job, progress, local=True)
    return INTERRUPTED if interrupts.asked.is_set() and job.state == job_pb2.Job.STATE_CANCELLED else code


async def _follow_local(
    orchestrator: LocalOrchestrator, name: str, progress: Progress, display: Display, interrupts: Interrupts
) -> job_pb2.Job | None:
    """Follows the job; the first interrupt cancels it, the second gives it up, and None is returned."""
    following = asyncio.ensure_future(follow_job(orchestrator, name, progress, display))
    try:
        if await _until(interrupts.asked, asyncio.shield(following)) is None:
            display.say("stopping: the job saves what it can; interrupt once more to stop at once")
            await _until(interrupts.insisted, cancel_job(orchestrator, name))
            if await _until(interrupts.insisted, asyncio.shield(following)) is None:
                await orchestrator.stop(grace=0.0)
                return None
        return await following
    finally:
        following.cancel()


async def _submit_local(source: Source, launch: Launch) -> job_pb2.Job:
    """Creates the job, or goes on with the same one that was interrupted by a kill; ends another in its place."""
    client = await source.client()
    resolved = await client.create_job(launch.config, validate_only=True)
    async for job in client.list_jobs(states=_UNFINISHED):
        if job.config == resolved.config and _resumes(job):
            return job
        await client.cancel_job(job)
        await client.wait(job)
    return await client.create_job(launch.config, job_id=launch.job_id, labels=launch.labels)


def _resumes(job: job_pb2.Job) -> bool:
    return bool(train_keys(job).get("resume_from_checkpoint", True))


async def _until(event: asyncio.Event, work: Coroutine[Any, Any, T] | asyncio.Future[T]) -> T | None:
    """The result of `work`, or None (and the work cancelled) if `event` comes first."""
    task = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        waiting.cancel()


def _warn(job: job_pb2.Job) -> None:
    for warning in job.warnings:
        sys.stderr.write(f"warning: {warning}\n")


def _finish(job: job_pb2.Job, progress: Progress, *, local: bool) -> int:
    """Prints the last table and the error; returns the exit code."""
    from surogate.cli.running.summary import print_summary

    assert has_ended(job)
    sys.stdout.flush()
    print_summary(job, progress, local=local)
    if job.state == job_pb2.Job.STATE_SUCCEEDED:
        return OK
    if job.state == job_pb2.Job.STATE_FAILED:
        report(_error_of(job))
        where = Path(job.output_dir) / "logs"
        if local and where.is_dir():
            sys.stderr.write(f"  the services' logs are in {where}\n")
    return FAILED


def _error_of(job: job_pb2.Job) -> SurogateError:
    from surogate.rpc.status import from_status

    return from_status(job.error)


def _make_display() -> Display:
    """The live display if standard output is a terminal, else the plain one."""
    if not sys.stdout.isatty():
        return PlainDisplay()
    from surogate.cli.running.live import LiveDisplay

    return LiveDisplay()
