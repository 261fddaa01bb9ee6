"""PT and SFT jobs against a trainer that runs already (static launcher), a fake one."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from orchestrator_svc.jobs.context import WRITING_MODEL
from orchestrator_svc.jobs.metrics_file import read_metrics
from orchestrator_svc.jobs.training_job import TrainingJob
from orchestrator_svc.tracking.spec import LIBRARIES
from surogate.errors import ConfigError
from surogate.rpc.status import from_status
from surogate.v1 import job_pb2
from tests.helpers.orchestrator import Orchestrator, State, orchestrating, serving_fake_trainer, sft_config
from tests.helpers.trainer.fake_trainer import FakeTrainer
from tests.helpers.waiting import PATIENCE


@pytest_asyncio.fixture
async def trainer() -> AsyncIterator[tuple[str, FakeTrainer]]:
    async with serving_fake_trainer(step_seconds=0.01) as served:
        yield served


@pytest_asyncio.fixture
async def orchestrator(tmp_path: Path, trainer: tuple[str, FakeTrainer]) -> AsyncIterator[Orchestrator]:
    async with orchestrating(tmp_path, **static(trainer)) as orchestrator:
        yield orchestrator


def static(trainer: tuple[str, FakeTrainer]) -> dict[str, Any]:
    return {"launcher_name": "static", "trainer_address": trainer[0], "worker_wait": 60.0}


def steps_of(history: list[job_pb2.JobEvent], *, replayed: bool = False) -> list[int]:
    return [
        event.step_completed.step
        for event in history
        if event.HasField("step_completed") and event.step_completed.replayed == replayed
    ]


async def test_a_job_is_trained_to_its_end(orchestrator: Orchestrator, trainer: tuple[str, FakeTrainer]) -> None:
    job = await orchestrator.create(sft_config("warns"))
    history = await orchestrator.history(job.name)
    done = await orchestrator.get(job.name)
    assert done.state == State.STATE_SUCCEEDED, done.error.message
    assert (done.step, done.max_steps) == (5, 5)
    assert steps_of(history) == [1, 2, 3, 4, 5]
    saved = [event.checkpoint_saved for event in history if event.HasField("checkpoint_saved")]
    assert [(item.step, item.final) for item in saved] == [(2, False), (4, False), (5, True)]
    evaluation = next(event.evaluation_completed for event in history if event.HasField("evaluation_completed"))
    assert (evaluation.step, evaluation.environment) == (5, "validation")
    assert "the learning rate is high" in [event.notice.text for event in history]
    out = Path(done.output_dir)
    assert [(line["step"], line["loss"]) for line in read_metrics(out / "metrics.jsonl")] == [
        (step, pytest.approx(1 / step)) for step in range(1, 6)
    ]
    assert json.loads((out / "evaluations.jsonl").read_text())["step"] == 5
    assert (out / "plots" / "loss.png").exists()
    assert not trainer[1].sessions, "the session is freed"


async def test_a_failure_of_the_trainer_is_the_jobs_with_all_its_details(orchestrator: Orchestrator) -> None:
    job = await orchestrator.create(sft_config("no-model"))
    ended = await orchestrator.ended(job.name)
    assert ended.state == State.STATE_FAILED
    error = from_status(ended.error)
    assert isinstance(error, ConfigError)
    assert [str(violation) for violation in error.violations] == ["train.model: has no weights in it"]


async def test_a_dead_training_worker_is_replaced_and_goes_on_from_its_checkpoint(orchestrator: Orchestrator) -> None:
    job = await orchestrator.create(sft_config("worker-dies-once"))
    history = await orchestrator.history(job.name)
    done = await orchestrator.get(job.name)
    assert done.state == State.STATE_SUCCEEDED, done.error.message
    assert steps_of(history) == [1, 2, 3, 4, 5]
    assert steps_of(history, replayed=True) == [3]
    assert [line["step"] for line in read_metrics(Path(done.output_dir) / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    notices = [event.notice.text for event in history if event.notice.component == "trainer"]
    assert notices[0].startswith("training is taken up again: the training worker was killed")
    assert notices[1] == "training goes on from the checkpoint of step 2; 1 steps are trained again"


async def test_a_run_that_was_done_already_says_so(orchestrator: Orchestrator) -> None:
    job = await orchestrator.create(sft_config(max_steps=4, output_dir="done"))
    await orchestrator.ended(job.name)
    again = await orchestrator.create(sft_config(max_steps=3, output_dir="done"))
    history = await orchestrator.history(again.name)
    assert (await orchestrator.get(again.name)).state == State.STATE_SUCCEEDED
    told = [event.notice.text for event in history if event.notice.component == "trainer"]
    assert told[0].startswith("the checkpoint of step 4 is there already, and max_steps is 3: nothing is trained.")
    assert steps_of(history) == []


async def test_an_error_that_would_come_again_is_not_tried_again(orchestrator: Orchestrator) -> None:
    job = await orchestrator.create(sft_config("diverges"))
    ended = await orchestrator.ended(job.name)
    assert (ended.state, ended.error.message) == (State.STATE_FAILED, "the loss is not a number")
    assert ended.checkpoint.endswith("checkpoint-2"), "the last checkpoint stays good"


async def test_a_cancelled_job_saves_first(orchestrator: Orchestrator) -> None:
    job = await orchestrator.create(sft_config(max_steps=100_000, save_steps=50_000))
    await orchestrator.until_step(job.name, 3)
    await orchestrator.cancel(job.name)
    ended = await orchestrator.ended(job.name)
    assert ended.state == State.STATE_CANCELLED
    saved = int(ended.checkpoint.rpartition("-")[2])
    assert 3 <= saved == ended.step


async def test_a_job_that_still_loads_is_cancelled_at_once(
    orchestrator: Orchestrator, trainer: tuple[str, FakeTrainer]
) -> None:
    job = await orchestrator.create(sft_config("loads-forever"))
    async for event in orchestrator.watch(job.name):
        if event.state_changed.status_message == "loading the model":
            break
    await orchestrator.cancel(job.name)
    assert (await orchestrator.ended(job.name)).state == State.STATE_CANCELLED
    after = await orchestrator.create(sft_config())
    assert (await orchestrator.ended(after.name)).state == State.STATE_SUCCEEDED


async def test_without_resume_from_checkpoint_a_job_still_resumes_itself(orchestrator: Orchestrator) -> None:
    (orchestrator.folder / "out" / "checkpoint-4").mkdir(parents=True)  # another run's
    job = await orchestrator.create(sft_config("worker-dies-once", resume_from_checkpoint=False))
    history = await orchestrator.history(job.name)
    assert steps_of(history) == [1, 2, 3, 4, 5]
    assert steps_of(history, replayed=True) == [3]


async def test_a_checkpoint_that_the_orchestrator_does_not_see_is_gone_on_from_by_name(
    orchestrator: Orchestrator, trainer: tuple[str, FakeTrainer]
) -> None:
    """In a pod the trainer has a disk of its own, and the folder may hold checkpoints of another run."""
    other = orchestrator.folder / "out" / "checkpoint-4"
    other.mkdir(parents=True)
    job = await orchestrator.create(sft_config("worker-dies-once", resume_from_checkpoint=False))
    await orchestrator.history(job.name)
    assert origins(trainer[1]) == [("", True), ("checkpoint-2", False)]


async def test_a_checkpoint_that_is_lost_leaves_the_choice_to_the_trainer(
    orchestrator: Orchestrator, trainer: tuple[str, FakeTrainer]
) -> None:
    lost = asyncio.create_task(lose_checkpoint(orchestrator.folder / "out"))
    job = await orchestrator.create(sft_config("worker-dies-once"))
    history = await orchestrator.history(job.name)
    await lost
    done = await orchestrator.get(job.name)
    assert done.state == State.STATE_SUCCEEDED, done.error.message
    assert steps_of(history, replayed=True) == [1, 2, 3]
    assert origins(trainer[1]) == [("", False), ("checkpoint-2", False), ("", False)]


def origins(trainer: FakeTrainer) -> list[tuple[str, bool]]:
    """What sessions were told to begin from: the checkpoint's name, and whether to ignore others."""
    told = [(request.resume_from.rpartition("/")[2], request.fresh) for request in trainer.requests]
    return [key for key, _ in itertools.groupby(told)]


async def lose_checkpoint(output: Path) -> None:
    """Removes the checkpoint of step 2 when the worker has died, before the job goes on from it."""
    while not (output / "misbehaved").exists():  # noqa: ASYNC110 - nothing else tells of it
        await asyncio.sleep(0.01)
    (output / "checkpoint-2").rmdir()


async def test_what_was_trained_while_no_orchestrator_was_there_is_written_down(
    tmp_path: Path, trainer: tuple[str, FakeTrainer]
) -> None:
    _, fake = trainer
    async with orchestrating(tmp_path, **static(trainer)) as one:
        job = await one.create(sft_config(max_steps=600, save_steps=50), job_id="one")
        await one.until_step(job.name, 2)
        assert one.runner is not None
        await one.runner.stop()
        async for _ in fake.sessions["one"].events.watch(0):  # to its end
            pass
        one.runner.start()
        history = await one.history(job.name)
        done = await one.get(job.name)
        assert done.state == State.STATE_SUCCEEDED, done.error.message
        assert steps_of(history) == list(range(1, 601))
        lines = read_metrics(Path(done.output_dir) / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(1, 601))


async def test_an_end_that_was_written_down_is_found_again(
    tmp_path: Path, trainer: tuple[str, FakeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The orchestrator dies between the last event of a session and the end of its job."""
    reached = asyncio.Event()

    async def die(self: TrainingJob) -> None:
        reached.set()
        await asyncio.Event().wait()

    async with orchestrating(tmp_path, **static(trainer)) as one:
        assert one.runner is not None
        with monkeypatch.context() as patch:
            patch.setattr(TrainingJob, "_forget_session", die)
            job = await one.create(sft_config(), job_id="one")
            async with asyncio.timeout(PATIENCE):
                await reached.wait()
            await one.runner.stop()
        one.runner.start()
        history = await one.history(job.name)
        assert (await one.get(job.name)).state == State.STATE_SUCCEEDED
        assert steps_of(history) == [1, 2, 3, 4, 5]


async def test_an_orchestrator_that_is_stopped_leaves_the_job_to_the_next(
    tmp_path: Path, trainer: tuple[str, FakeTrainer]
) -> None:
    async with orchestrating(tmp_path, **static(trainer)) as before:
        job = await before.create(sft_config(max_steps=60))
        await before.until_step(job.name, 10)
    async with orchestrating(tmp_path, **static(trainer)) as after:
        history = await after.history(job.name)
        done = await after.get(job.name)
    assert done.state == State.STATE_SUCCEEDED
    assert steps_of(history) == list(range(1, 61)), "the trainer went on, and nothing is missing or told twice"
    assert not steps_of(history, replayed=True)
    assert [line["step"] for line in read_metrics(Path(done.output_dir) / "metrics.jsonl")] == list(range(1, 61))
    assert len(trainer[1].requests) == 2


async def test_a_trainer_that_never_comes_fails_the_job_by_name(tmp_path: Path) -> None:
    settings = {"trainer_address": "127.0.0.1:1", "worker_wait": 0.5, "launcher_name": "static"}
    async with orchestrating(tmp_path, **settings) as orchestrator:
        job = await orchestrator.create(sft_config())
        ended = await orchestrator.ended(job.name)
    assert ended.state == State.STATE_FAILED
    assert "trainer-0 at 127.0.0.1:1 was not ready" in ended.error.message


async def test_two_orchestrators_on_one_store_run_a_job_once(tmp_path: Path, trainer: tuple[str, FakeTrainer]) -> None:
    keeps = {"lease_seconds": 60.0, **static(trainer)}
    one = orchestrating(tmp_path, **keeps, identity="host-a/ns/1/1/x")
    two = orchestrating(tmp_path, **keeps, identity="host-b/ns/1/1/y")
    async with one as first, two as second:
        jobs = [await first.create(sft_config(output_dir=f"out-{i}"), job_id=f"j{i}") for i in range(4)]
        histories = await asyncio.gather(*(second.history(job.name) for job in jobs))
    for history in histories:
        assert steps_of(history) == [1, 2, 3, 4, 5]
        assert not steps_of(history, replayed=True)


async def test_a_job_is_reported_to_its_trackers(orchestrator: Orchestrator) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = await orchestrator.create(sft_config("m", report_to="tensorboard", log_file="train.log"))
    done = await orchestrator.ended(job.name)
    assert done.state == State.STATE_SUCCEEDED, done.error.message
    out = Path(done.output_dir)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert events.Scalars("eval/validation/loss")[0].step == 5
    assert (out / "train.log").read_text().endswith("succeeded\n")
    said = [e.state_changed.status_message for e in await orchestrator.history(job.name) if e.HasField("state_changed")]
    assert said[-3:] == [WRITING_MODEL, "sending what is left to tensorboard", "done"]


async def test_a_tracker_whose_library_is_missing_is_said_and_the_job_trains(
    orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LIBRARIES, "wandb", "no_such_module")
    job = await orchestrator.create(sft_config("m", report_to=["wandb"]))
    history = await orchestrator.history(job.name)
    done = await orchestrator.get(job.name)
    assert done.state == State.STATE_SUCCEEDED, done.error.message
    told = [event.notice.text for event in history if event.HasField("notice")]
    assert "wandb of report_to is not installed: pip install 'surogate[tracking]'" in told
