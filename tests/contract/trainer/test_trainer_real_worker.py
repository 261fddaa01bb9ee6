"""The trainer as a whole, front and worker: PT by itself, GRPO step by step, pushes that a replica takes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from surogate.rpc.status import from_status
from surogate.v1 import trainer_pb2 as trainer
from surogate.weights.memory import SHM
from tests.helpers import rpc
from tests.helpers.models.tiny import make_tiny_model
from tests.helpers.trainer.trainer_front import ID, Front, State, header, sample, serving, trained
from tests.helpers.weight_images import replica

WORKER = (sys.executable, "-m", "trainer_svc.worker")
COMMON: dict[str, Any] = {"torch_dtype": "float32", "optimizer": "adamw", "learning_rate": 1e-2, "sequence_len": 64}
LORA = {**COMMON, "lora": True, "lora_rank": 4, "lora_alpha": 8, "loss": {"type": "ipo"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder, layers=1, hidden=32)
    return str(folder)


DYING_WORKER = (sys.executable, "-m", "tests.helpers.trainer.dying_worker")


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    async with serving(tmp_path, command=WORKER) as front:
        yield front


async def step(front: Front, number: int) -> trainer.TrainStepResponse:
    """A step on two rollouts, one good and one bad, by tokens that say so."""
    tokens = [[5, 6, 7, 8], [5, 6, 9, 10]]
    samples = [sample(f"{i}", token_ids=ids, advantage=1.0 - 2 * i) for i, ids in enumerate(tokens)]
    return await front.send([header(number, 2), trained(samples)])


async def logprobs(front: Front, ids: list[int]) -> list[float]:
    """ComputeLogprobs of one sequence."""
    request = trainer.ComputeLogprobsRequest(session_id=ID, temperature=0.8)
    request.sequences.add(ids=ids)
    return list((await front.stub.ComputeLogprobs(request)).sequences[0].logprobs)


async def push(front: Front, version: int, target: str) -> trainer.ReplicaPush:
    """PushWeights to one replica."""
    request = trainer.PushWeightsRequest(session_id=ID, version=version, targets=[target])
    return (await front.stub.PushWeights(request, timeout=60)).replicas[0]


async def test_reinforcement_with_pushes_and_a_worker_that_is_killed(front: Front, model: str) -> None:
    session = await front.ready(model=model, train=LORA)
    assert 0 < session.num_trainable_parameters < session.num_parameters
    good = [5, 6, 7, 8]
    before = sum((await logprobs(front, good))[1:])
    for number in (1, 2):
        response = await step(front, number)
        assert {"loss", "grad_norm", "lr", "entropy", "mismatch_kl", "masked/fraction"} <= response.metrics.keys()

    await check_pushes(front, version=2)

    saved = await front.stub.CreateCheckpoint(trainer.CreateCheckpointRequest(session_id=ID, step=2), timeout=60)
    undisturbed = await step(front, 3)
    after = await logprobs(front, good)
    assert sum(after[1:]) > before

    (worker,) = [child for child in psutil.Process().children() if "trainer_svc.worker" in child.cmdline()]
    os.kill(worker.pid, signal.SIGKILL)
    failed = await front.until(State.STATE_FAILED)
    assert from_status(failed.error).reason == "WORKER_DIED"
    await front.stub.DeleteSession(trainer.DeleteSessionRequest(session_id=ID))

    session = await front.ready(model=model, train=LORA, resume_from=saved.path)
    assert (session.step, session.checkpoint_step) == (2, 2)
    replayed = await step(front, 3)
    assert replayed.metrics["loss"] == undisturbed.metrics["loss"]
    assert await logprobs(front, good) == after


async def check_pushes(front: Front, version: int) -> None:
    """A replica takes the weights once, a second one that comes later the same, one that is not there is named."""
    async with AsyncExitStack() as stack:
        for _ in range(2):
            fake = stack.enter_context(replica(SHM))
            server = await stack.enter_async_context(rpc.serving(fake.register))
            for _ in range(2):
                outcome = await push(front, version, server.address)
                assert not outcome.HasField("error"), outcome.error.message
            assert (fake.staging.served_version, fake.commits) == (version, 1)
            assert fake.served
    assert from_status((await push(front, version, "127.0.0.1:9")).error).reason == "UNAVAILABLE"
    assert (await front.get()).policy_version == version


async def test_pretraining_by_itself(front: Front, model: str) -> None:
    rows = [json.dumps({"text": f"{n} and {n} is {2 * n}. "}) for n in range(40)]
    (front.output / "data.jsonl").write_text("\n".join(rows))
    train = {**COMMON, "lora": False, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    await front.ready("pt", model=model, max_steps=8, train=train)
    await front.stub.StartSession(trainer.StartSessionRequest(session_id=ID))
    request = trainer.WatchSessionRequest(session_id=ID)
    events = [event async for event in front.stub.WatchSession(request, timeout=120)]
    assert events[-1].session.state == State.STATE_SUCCEEDED, events[-1].session.error.message
    losses = [event.step.metrics["loss"] for event in events if event.HasField("step")]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert (front.output / "model.safetensors").exists()


async def test_a_kill_in_the_middle_of_a_checkpoint_leaves_the_one_before_it(tmp_path: Path, model: str) -> None:
    rows = [json.dumps({"text": f"{n} and {n} is {2 * n}. "}) for n in range(40)]
    train = {**COMMON, "lora": False, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    async with serving(tmp_path, command=DYING_WORKER) as front:
        (front.output / "data.jsonl").write_text("\n".join(rows))
        for step in (0, 2):
            session = await front.ready("pt", model=model, max_steps=4, train={**train, "save_steps": 2})
            assert (session.step, session.checkpoint_step) == (step, step)
            assert not [*front.output.glob(".tmp-*")]
            await front.stub.StartSession(trainer.StartSessionRequest(session_id=ID))
            ended = await front.until(State.STATE_SUCCEEDED)
            if step == 0:
                assert from_status(ended.error).reason == "WORKER_DIED"
                assert [*front.output.glob(".tmp-checkpoint-4/trainer_state/*.safetensors")]
                await front.stub.DeleteSession(trainer.DeleteSessionRequest(session_id=ID))
        assert ended.state == State.STATE_SUCCEEDED
    assert {path.name for path in front.output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
