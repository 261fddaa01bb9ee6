"""Two ranks behind one front: steps, a push, a checkpoint; a rank that dies ends the session by name, and all of it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from surogate.ports import free_port
from surogate.rpc.status import from_status
from surogate.v1 import trainer_pb2 as trainer
from surogate.weights.memory import SHM
from tests.contract.trainer.test_trainer_real_worker import LORA, WORKER, logprobs, push, step
from tests.helpers import rpc
from tests.helpers.models.tiny import make_tiny_model
from tests.helpers.trainer.trainer_front import ID, State, serving
from tests.helpers.weight_images import replica


def workers() -> list[psutil.Process]:
    """The ranks' processes, rank 0 first."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # another test's, which has ended
            found.append((child, child.cmdline()))
    found = [(child, line) for child, line in found if "trainer_svc.worker" in line]
    return [child for child, _ in sorted(found, key=lambda item: "--fd" not in item[1])]


@pytest.mark.slow
async def test_two_ranks_train_push_save_and_fall_together(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", layers=1, hidden=32)
    train = {**LORA, "gpus": 2, "zero_level": 3, "recompute": False}
    async with serving(tmp_path, command=WORKER) as front:
        await front.ready(model=str(tmp_path / "model"), train=train)
        assert len(workers()) == 2
        good = [5, 6, 7, 8]
        before = await logprobs(front, good)
        for number in (1, 2):
            assert (await step(front, number)).metrics["grad_norm"] > 0
        assert sum((await logprobs(front, good))[1:]) > sum(before[1:])

        with replica(SHM) as fake:
            async with rpc.serving(fake.register) as server:
                outcome = await push(front, 2, server.address)
            assert not outcome.HasField("error"), outcome.error.message
            assert fake.staging.served_version == 2
        saved = await front.stub.CreateCheckpoint(trainer.CreateCheckpointRequest(session_id=ID, step=2), timeout=60)
        assert (Path(saved.path) / "adapter_model.safetensors").exists()

        leader, follower = workers()
        os.kill(follower.pid, signal.SIGKILL)
        error = from_status((await front.until(State.STATE_FAILED)).error)
        assert (error.reason, error.metadata["rank"], error.metadata["signal"]) == ("WORKER_DIED", "1", "SIGKILL")
        assert "rank 1 was killed by SIGKILL" in error.message
        assert not leader.is_running() or leader.status() == psutil.STATUS_ZOMBIE
        assert not workers()


@pytest.mark.slow
async def test_a_rank_zero_that_dies_is_named(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", layers=1, hidden=32)
    async with serving(tmp_path, command=WORKER) as front:
        await front.ready(model=str(tmp_path / "model"), train={**LORA, "gpus": 2, "recompute": False})
        os.kill(workers()[0].pid, signal.SIGKILL)
        error = from_status((await front.until(State.STATE_FAILED)).error)
        assert (error.reason, error.metadata["rank"]) == ("WORKER_DIED", "0")
        assert not workers()


NODE = [sys.executable, "-m", "trainer_svc.node", "--num-nodes", "2", "--gpus-per-node", "1"]
SERVICE = [sys.executable, "-m", "trainer_svc", "--listen", "127.0.0.1:0"]
"""In a cluster all nodes run the same command; a further one offers its ranks again when a session has ended."""


@pytest.mark.slow
@pytest.mark.parametrize("command", [NODE, SERVICE])
async def test_two_nodes_meet_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    make_tiny_model(tmp_path / "model", layers=1, hidden=32)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in meeting.items():
        monkeypatch.setenv(name, value)
    further = {"NODE_RANK": "1", "NUM_NODES": "2", "GPUS_PER_NODE": "1"}
    node = await asyncio.create_subprocess_exec(*command, env={**os.environ, **meeting, **further})
    try:
        async with serving(tmp_path, command=WORKER) as front:
            train = {**LORA, "distributed": {"num_nodes": 2, "gpus_per_node": 1}, "recompute": False}
            await front.ready(model=str(tmp_path / "model"), train=train)
            assert (await step(front, 1)).metrics["grad_norm"] > 0
            await front.stub.DeleteSession(trainer.DeleteSessionRequest(session_id=ID))
            if command is SERVICE:
                node.terminate()
            assert await asyncio.wait_for(node.wait(), 120) == 0
    finally:
        if node.returncode is None:
            node.kill()
            await node.wait()
