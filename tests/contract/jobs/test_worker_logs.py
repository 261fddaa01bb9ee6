"""ReadLogs with child processes, and `surogate jobs logs` and `scale` on the command line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator_svc.launchers.files import follow_file
from surogate.errors import FailedPreconditionError, InvalidInputError
from surogate.v1 import job_pb2
from tests.helpers.orchestrator import Orchestrator, orchestrating, serving_fake_trainer, sft_config


async def logs(orchestrator: Orchestrator, name: str, **request: Any) -> list[job_pb2.LogLine]:
    call = orchestrator.stub.ReadLogs(job_pb2.ReadLogsRequest(name=name, **request), timeout=60)
    return [line async for line in call]


async def test_logs_of_child_processes_are_followed_to_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.2")
    modules = {"trainer": "tests.helpers.trainer.fake_trainer"}
    async with orchestrating(tmp_path, worker_modules=modules) as orchestrator:
        job = await orchestrator.create(sft_config(max_steps=5))
        await orchestrator.until_step(job.name, 1)
        lines = await logs(orchestrator, job.name, component="trainer-0", follow=True)
        ended = await orchestrator.ended(job.name)
        assert ended.state == job_pb2.Job.STATE_SUCCEEDED, ended.status_message
        text = [line.text for line in lines]
        assert any("serving" in line for line in text) and any("stopped" in line for line in text)
        assert [line.text for line in await logs(orchestrator, job.name, tail_lines=2)] == text[-2:]
        with pytest.raises(InvalidInputError, match="tail_lines"):
            await logs(orchestrator, job.name, tail_lines=10_001)


async def test_static_workers_have_their_logs_elsewhere_and_are_not_scaled(tmp_path: Path) -> None:
    async with serving_fake_trainer(step_seconds=0.05) as (address, _):
        settings = {"launcher_name": "static", "trainer_address": address}
        async with orchestrating(tmp_path, **settings) as orchestrator:
            job = await orchestrator.create(sft_config(max_steps=5000))
            await orchestrator.until_step(job.name, 1)
            [line] = await logs(orchestrator, job.name)
            assert line.text == "[no more: trainer-0 is run by somebody else, who has its log]"
            with pytest.raises(FailedPreconditionError, match="no replicas"):
                await orchestrator.stub.ScaleJob(job_pb2.ScaleJobRequest(name=job.name, inference=2))
            await orchestrator.cancel(job.name)


async def collect(lines: AsyncIterator[str]) -> list[str]:
    return [line async for line in lines]


async def test_a_file_is_followed_by_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "w.log"
    ended = False
    task = asyncio.create_task(collect(follow_file(file, 2, lambda: ended)))
    await asyncio.sleep(0.05)
    file.write_text("a\nb")
    await asyncio.sleep(0.4)
    with file.open("a") as out:
        out.write("c\nd")
    ended = True
    assert await task == ["a", "bc", "d"]
    assert await collect(follow_file(file, 2, lambda: True)) == ["bc", "d"]
