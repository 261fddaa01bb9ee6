"""The trainer as a process: what a SIGTERM saves, and that nothing outlives a SIGKILL."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from surogate.process import ServiceProcess, start_service
from surogate.rpc.channel import open_channel
from surogate.v1 import trainer_pb2 as trainer
from surogate.v1 import trainer_pb2_grpc
from tests.helpers.trainer.trainer_front import ID, Front
from tests.helpers.waiting import PATIENCE, until


@asynccontextmanager
async def process(folder: Path) -> AsyncIterator[tuple[ServiceProcess, Front]]:
    """A trainer in a process of its own, its files under `folder`."""
    for name in ("output", "shm"):
        (folder / name).mkdir()
    arguments = ["--scratch-dir", str(folder / "shm"), "--metrics-listen", "127.0.0.1:0"]
    service = await start_service(
        "tests.helpers.trainer.trainer_front_process", arguments, log_file=folder / "trainer.log"
    )
    try:
        async with open_channel(service.address) as channel:
            yield service, Front(trainer_pb2_grpc.TrainerServiceStub(channel), folder / "output", scratch=None)
    finally:
        await service.stop(grace=PATIENCE)


async def first_step(front: Front) -> None:
    """Watches until a step is done."""
    async for event in front.stub.WatchSession(trainer.WatchSessionRequest(session_id=ID), timeout=60):
        if event.HasField("step"):
            return


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_sigterm_saves_what_runs_and_leaves_nothing(tmp_path: Path) -> None:
    async with process(tmp_path) as (service, front):
        await front.ready("pt", max_steps=10**6)
        await front.stub.StartSession(trainer.StartSessionRequest(session_id=ID))
        await first_step(front)
        assert await service.stop(grace=PATIENCE) == 0
    assert list((tmp_path / "output").glob("checkpoint-*"))
    assert not list((tmp_path / "shm").iterdir())


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "in a step"])
async def test_a_worker_does_not_outlive_a_killed_front(tmp_path: Path, busy: bool) -> None:
    async with process(tmp_path) as (service, front):
        await front.ready()
        pid = int((await front.train(1)).metrics["pid"])
        request = trainer.PushWeightsRequest(session_id=ID, version=1, targets=["127.0.0.1:9"])
        calls = [front.stub.PushWeights(request, timeout=30), *([front.train(2, ids=("hang",))] if busy else [])]
        outcomes = asyncio.gather(*calls, return_exceptions=True)
        if busy:
            await front.until_begun(2)
        service.process.kill()
        await until(lambda: gone(pid))
        await outcomes
    assert not list((tmp_path / "shm").glob("*/v1"))


def test_the_front_knows_no_torch_and_answers_help_at_once() -> None:
    code = "import sys, trainer_svc.__main__, trainer_svc.service; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    done = subprocess.run([sys.executable, "-m", "trainer_svc", "--help"], capture_output=True, text=True, check=True)
    assert "--scratch-dir" in done.stdout
