"""Real processes around a fake trainer: kills in the middle, takeovers, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from orchestrator_svc.jobs.metrics_file import read_metrics
from surogate.process import ServiceProcess, start_service
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.v1 import job_pb2, job_pb2_grpc
from tests.helpers.orchestrator import Orchestrator, State, sft_config
from tests.helpers.waiting import PATIENCE

TOKEN = "secret"


@asynccontextmanager
async def orchestrator_process(
    folder: Path, *, step_seconds: float = 0.02, log: str = "orchestrator.log", **flags: str
) -> AsyncIterator[tuple[Orchestrator, ServiceProcess]]:
    """`python -m orchestrator_svc` whose trainers are fakes."""
    values = {
        "store-url": f"sqlite:///{folder}/jobs.db",
        "output-root": str(folder),
        "worker-modules": json.dumps({"trainer": "tests.helpers.trainer.fake_trainer"}),
        "worker-stop-seconds": "60",
        **flags,
    }
    arguments = [part for name, value in values.items() for part in (f"--{name}", value)]
    process = await start_service(
        "orchestrator_svc",
        arguments,
        log_file=folder / log,
        token=TOKEN,
        environment={"FAKE_STEP_SECONDS": str(step_seconds), "OMP_NUM_THREADS": "1"},
    )
    try:
        async with open_channel(process.address, ClientSecurity(token=TOKEN)) as channel:
            yield Orchestrator(job_pb2_grpc.JobServiceStub(channel), folder), process
    finally:
        await process.stop(grace=PATIENCE)


def steps_of(history: list[job_pb2.JobEvent], *, replayed: bool) -> list[int]:
    done = [event.step_completed for event in history if event.HasField("step_completed")]
    return [step.step for step in done if step.replayed == replayed]


def children_of(pid: int) -> list[int]:
    """Ids of the direct children of a process."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(word) for word in path.read_text().split()]
    return found


async def gone(pids: list[int]) -> None:
    """Waits until none of the processes runs."""
    for pid in pids:
        while _runs(pid):  # noqa: ASYNC110 - the kernel sets no event
            await asyncio.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_a_job_has_its_own_worker_and_leaves_no_process(tmp_path: Path) -> None:
    async with orchestrator_process(tmp_path) as (orchestrator, process):
        job = await orchestrator.create(sft_config())
        await orchestrator.until_step(job.name, 1)
        children = children_of(process.process.pid)
        assert len(children) == 1
        worker = (await orchestrator.get(job.name)).workers[0]
        assert (worker.component, worker.restarts) == ("trainer", 0)
        done = await orchestrator.ended(job.name)
        assert done.state == State.STATE_SUCCEEDED, done.error.message
        assert not done.workers
        await gone(children)
    assert (tmp_path / "out" / "logs" / "trainer-0.log").stat().st_size > 0


async def test_kill_of_the_trainer_in_the_middle(tmp_path: Path) -> None:
    async with orchestrator_process(tmp_path, step_seconds=0.05) as (orchestrator, process):
        job = await orchestrator.create(sft_config(max_steps=40, save_steps=5))
        await orchestrator.until_step(job.name, 12)
        os.kill(children_of(process.process.pid)[0], signal.SIGKILL)
        history = await orchestrator.history(job.name)
        done = await orchestrator.get(job.name)
    assert done.state == State.STATE_SUCCEEDED, done.error.message
    assert steps_of(history, replayed=False) == list(range(1, 41))
    assert steps_of(history, replayed=True)[0] % 5 == 1, "from the newest checkpoint on"
    assert [line["step"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")] == list(range(1, 41))
    notices = [event.notice.text for event in history if event.HasField("notice")]
    assert any("trainer-0 was killed by signal 9; starting it again" in text for text in notices)


async def test_kill_of_the_orchestrator_in_the_middle(tmp_path: Path) -> None:
    async with orchestrator_process(tmp_path, step_seconds=0.05) as (orchestrator, process):
        job = await orchestrator.create(sft_config(max_steps=40, save_steps=5), request_id="r")
        await orchestrator.until_step(job.name, 12)
        children = children_of(process.process.pid)
        process.process.kill()
        await process.process.wait()
        await gone(children)
    async with orchestrator_process(tmp_path, step_seconds=0.05) as (orchestrator, _):
        assert (await orchestrator.create(sft_config(max_steps=40, save_steps=5), request_id="r")).name == job.name
        history = await orchestrator.history(job.name)
        done = await orchestrator.get(job.name)
    assert done.state == State.STATE_SUCCEEDED, done.error.message
    assert [event.sequence for event in history] == list(range(1, len(history) + 1))
    assert steps_of(history, replayed=False) == list(range(1, 41))
    assert [line["step"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")] == list(range(1, 41))


async def test_sigterm_leaves_the_job_to_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    async with orchestrator_process(tmp_path, step_seconds=0.05) as (orchestrator, process):
        job = await orchestrator.create(sft_config(max_steps=30, save_steps=1000))
        await orchestrator.until_step(job.name, 7)
        children = children_of(process.process.pid)
        assert await process.stop(grace=PATIENCE) == 0
        await gone(children)
    assert list((tmp_path / "out").glob("checkpoint-*")), "the trainer saved when it was told to end"
    async with orchestrator_process(tmp_path, step_seconds=0.05) as (orchestrator, _):
        history = await orchestrator.history(job.name)
        assert (await orchestrator.get(job.name)).state == State.STATE_SUCCEEDED
    assert steps_of(history, replayed=False) == list(range(1, 31))


async def test_a_cancelled_job_whose_orchestrator_dies_ends_cancelled(tmp_path: Path) -> None:
    async with orchestrator_process(tmp_path) as (orchestrator, process):
        job = await orchestrator.create(sft_config("loads-forever"))
        await orchestrator.until(job.name, State.STATE_STARTING)
        os.kill(process.process.pid, signal.SIGSTOP)
        cancelling = asyncio.ensure_future(orchestrator.cancel(job.name))
        await asyncio.sleep(0.2)
        os.kill(process.process.pid, signal.SIGCONT)
        with suppress(Exception):
            await cancelling
        process.process.kill()
        await process.process.wait()
    async with orchestrator_process(tmp_path) as (orchestrator, _):
        assert (await orchestrator.ended(job.name)).state == State.STATE_CANCELLED


async def test_a_trainer_that_always_dies_fails_the_job_with_its_last_words(tmp_path: Path) -> None:
    async with orchestrator_process(tmp_path, **{"max-worker-restarts": "2"}) as (orchestrator, _):
        job = await orchestrator.create(sft_config("front-always-dies", save_steps=100))
        ended = await orchestrator.ended(job.name)
    assert ended.state == State.STATE_FAILED
    assert "trainer-0 ended with exit code 9 after 2 restarts" in ended.error.message
    assert "trainer-0.log" in ended.error.message


async def test_another_orchestrator_takes_over_when_the_lease_ends(tmp_path: Path) -> None:
    flags = {"lease-seconds": "6"}
    async with orchestrator_process(tmp_path, log="one.log", step_seconds=0.05, **flags) as (one, process):
        job = await one.create(sft_config(max_steps=40, save_steps=5))
        await one.until_step(job.name, 7)
        async with orchestrator_process(tmp_path, log="two.log", step_seconds=0.05, **flags) as (two, _):
            history = asyncio.ensure_future(two.history(job.name))  # followed on the one that does not run it
            await two.until_step(job.name, 9)
            process.process.kill()
            await process.process.wait()
            assert steps_of(await history, replayed=False) == list(range(1, 41))
            assert (await two.get(job.name)).state == State.STATE_SUCCEEDED


async def test_a_terminals_interrupt_does_not_reach_the_workers(tmp_path: Path) -> None:
    async with orchestrator_process(tmp_path, step_seconds=0.05) as (orchestrator, process):
        job = await orchestrator.create(sft_config())
        await orchestrator.until_step(job.name, 1)
        worker = children_of(process.process.pid)[0]
        assert os.getsid(worker) != os.getsid(process.process.pid)


@pytest.mark.parametrize(
    "flags", [["--store-url", "nosuch://x"], ["--launcher", "static"], ["--max-running-jobs", "0"]]
)
async def test_bad_settings_are_one_line_and_exit_code_2(flags: list[str]) -> None:
    process = await asyncio.create_subprocess_exec(
        "python", "-m", "orchestrator_svc", *flags, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"error: " in errors
    assert b"Traceback" not in errors
