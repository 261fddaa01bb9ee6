"""Sessions of the trainer's front: made, run, watched, failed, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.rpc import error_details_pb2

from surogate.errors import (
    AlreadyExistsError,
    ConfigError,
    FailedPreconditionError,
    NotFoundError,
    OutOfRangeError,
    SurogateError,
)
from surogate.rpc.status import from_status
from surogate.v1 import trainer_pb2 as trainer
from tests.helpers.trainer.trainer_front import ID, Front, State, serving


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    async with serving(tmp_path) as front:
        yield front


def kinds(events: list[trainer.SessionEvent]) -> list[str]:
    """States by their names, other events by their kinds, runs of steps as one."""
    names: list[str] = []
    for event in events:
        kind = event.WhichOneof("event") or ""
        name = State.Name(event.session.state).removeprefix("STATE_") if kind == "session" else kind
        if name != "step" or names[-1:] != ["step"]:
            names.append(name)
    return names


async def watch(front: Front, after: int = 0, session_id: str = ID) -> list[trainer.SessionEvent]:
    """All events from there on, until the session has ended."""
    request = trainer.WatchSessionRequest(session_id=session_id, after_sequence=after)
    return [event async for event in front.stub.WatchSession(request, timeout=60)]


async def until_step(front: Front, step: int) -> None:
    """Watches until a step is done."""
    async for event in front.stub.WatchSession(trainer.WatchSessionRequest(session_id=ID), timeout=60):
        if event.step.step >= step:
            return


async def start(front: Front) -> trainer.Session:
    """StartSession."""
    return await front.stub.StartSession(trainer.StartSessionRequest(session_id=ID))


async def delete(front: Front, session_id: str = ID) -> None:
    """DeleteSession."""
    await front.stub.DeleteSession(trainer.DeleteSessionRequest(session_id=session_id))


async def test_create_returns_at_once_and_the_session_gets_ready(front: Front) -> None:
    created = await front.create()
    assert (created.state, created.max_steps, created.incarnation) == (State.STATE_LOADING, 5, "incarnation-1")
    session = await front.until(State.STATE_READY)
    assert (session.num_parameters, session.num_trainable_parameters, session.step) == (1000, 10, 0)


async def test_pretraining_runs_to_its_end(front: Front) -> None:
    await front.ready("pt", model="warns")
    await start(front)
    events = await watch(front)
    assert kinds(events) == ["LOADING", "READY", "RUNNING", "warning", "step", "evaluation", "checkpoint", "SUCCEEDED"]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert [event.step.step for event in events if event.HasField("step")] == [1, 2, 3, 4, 5]
    session = await front.get()
    assert (session.step, session.checkpoint_step) == (5, 5)
    assert session.checkpoint == str(front.output / "checkpoint-5")


async def test_starting_twice_is_starting_once(front: Front) -> None:
    await front.ready("sft")
    assert (await start(front)).state == State.STATE_RUNNING
    await start(front)
    assert kinds(await watch(front))[-1] == "SUCCEEDED"
    assert (await start(front)).state == State.STATE_SUCCEEDED


async def test_a_watch_goes_on_where_the_last_one_stopped(front: Front) -> None:
    await front.ready("pt")
    await start(front)
    events = await watch(front)
    assert await watch(front, after=4) == events[4:]
    assert await watch(front, after=len(events)) == []
    with pytest.raises(OutOfRangeError, match="watch from 0"):
        await watch(front, after=len(events) + 1)


async def test_several_watch_at_once(front: Front) -> None:
    await front.ready("pt")
    watching = [asyncio.create_task(watch(front)) for _ in range(3)]
    await start(front)
    first, *others = await asyncio.gather(*watching)
    assert all(other == first for other in others)


async def test_create_again_returns_the_session_as_it_is(front: Front) -> None:
    await front.ready()
    await front.train(1)
    again = await front.create()
    assert (again.state, again.step) == (State.STATE_READY, 1)


async def test_create_again_with_another_configuration_is_refused(front: Front) -> None:
    await front.create()
    with pytest.raises(AlreadyExistsError, match="another configuration"):
        await front.create(max_steps=9)


async def test_a_trainer_works_on_one_session_at_a_time(front: Front) -> None:
    await front.create()
    with pytest.raises(FailedPreconditionError, match=f"at work on session {ID}") as refused:
        await front.create(session_id="job-2")
    assert refused.value.reason == "TRAINER_OCCUPIED"
    await delete(front)
    await front.create(session_id="job-2")


async def test_a_trainer_is_free_again_once_its_session_has_ended(front: Front) -> None:
    await front.create(model="no-model")
    await watch(front)
    await front.create(session_id="job-2")
    assert (await front.get()).state == State.STATE_FAILED


async def test_a_bad_configuration_is_refused_before_a_worker_starts(front: Front) -> None:
    request = front.create_request("grpo", "model")
    request.config["train"]["learning_rat"] = 1.0
    with pytest.raises(ConfigError, match=r"train\.learning_rat"):
        await front.stub.CreateSession(request)
    request = front.create_request("dpo", "model")
    with pytest.raises(ConfigError, match="pt, sft, grpo"):
        await front.stub.CreateSession(request)


async def test_a_model_that_cannot_be_loaded_fails_the_session_by_its_key(front: Front) -> None:
    await front.create(model="no-model")
    (failed,) = [e.session for e in await watch(front) if e.session.state == State.STATE_FAILED]
    error = from_status(failed.error)
    assert isinstance(error, ConfigError)
    assert [violation.field for violation in error.violations] == ["train.model"]


async def test_a_worker_that_dies_while_loading_says_how_and_its_last_words(front: Front) -> None:
    await front.create(model="dies-loading")
    await watch(front)
    session = await front.get()
    assert session.state == State.STATE_FAILED
    assert "SIGKILL" in session.error.message
    assert "allocating far too much" in session.error.message
    info = error_details_pb2.ErrorInfo()
    session.error.details[0].Unpack(info)
    assert (info.reason, info.metadata["signal"]) == ("WORKER_DIED", "SIGKILL")


async def test_a_worker_killed_while_idle_fails_the_session_at_once(front: Front) -> None:
    await front.ready()
    pid = int((await front.train(1)).metrics["pid"])
    watching = asyncio.create_task(watch(front))
    os.kill(pid, signal.SIGKILL)
    assert kinds(await watching)[-1] == "FAILED"


async def test_a_run_that_raises_fails_the_session(front: Front) -> None:
    await front.ready("pt", model="crashes")
    await start(front)
    assert kinds(await watch(front))[-1] == "FAILED"
    session = await front.get()
    assert session.step == 2
    assert "RuntimeError: the optimiser fell over" in session.error.message


async def test_a_worker_silent_for_too_long_while_loading_is_killed(tmp_path: Path) -> None:
    async with serving(tmp_path, load_timeout=5.0) as front:
        await front.create(model="loads-forever")
        await watch(front)
        assert "said nothing for 5 s in open" in (await front.get()).error.message


async def test_only_pt_and_sft_are_started_and_only_when_ready(front: Front) -> None:
    await front.create("pt", model="loads-forever")
    with pytest.raises(FailedPreconditionError, match="LOADING"):
        await start(front)
    await delete(front)
    await front.ready("grpo")
    with pytest.raises(FailedPreconditionError, match="TrainStep"):
        await start(front)


async def test_deleting_a_running_session_saves_a_checkpoint_first(front: Front) -> None:
    await front.ready("pt", max_steps=10**6)
    await start(front)
    watching = asyncio.create_task(watch(front))
    await until_step(front, 3)
    await delete(front)
    events = await watching
    assert kinds(events)[-2:] == ["checkpoint", "STOPPED"]
    assert list(front.output.glob("checkpoint-*"))
    with pytest.raises(NotFoundError):
        await front.get()


async def test_a_worker_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    async with serving(tmp_path, stop_timeout=0.3) as front:
        await front.ready("pt", model="never-stops", max_steps=10**6)
        await start(front)
        await delete(front)
        with pytest.raises(NotFoundError):
            await front.get()


async def test_deleting_a_session_that_loads_or_trains_does_not_wait_for_it(front: Front) -> None:
    await front.create(model="loads-forever")
    await delete(front)
    await front.ready()
    step = asyncio.create_task(front.train(1, ids=("hang",)))
    await front.until_begun(1)
    await delete(front)
    with pytest.raises(SurogateError):
        await step


async def test_checkpoints_are_of_the_step_the_caller_means(front: Front) -> None:
    await front.ready()
    await front.train(1)
    saved = await front.stub.CreateCheckpoint(trainer.CreateCheckpointRequest(session_id=ID, step=1, final=True))
    assert (saved.step, saved.path, saved.final) == (1, str(front.output / "checkpoint-1"), True)
    assert (await front.get()).checkpoint == saved.path
    with pytest.raises(FailedPreconditionError, match="1 steps are done"):
        await front.stub.CreateCheckpoint(trainer.CreateCheckpointRequest(session_id=ID, step=2))


async def test_logprobs_of_given_tokens(front: Front) -> None:
    await front.ready()
    await front.train(1)
    request = trainer.ComputeLogprobsRequest(session_id=ID, temperature=0.7)
    request.sequences.add(ids=[1, 2, 3])
    response = await front.stub.ComputeLogprobs(request)
    assert list(response.sequences[0].logprobs) == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("ids", "temperature", "what"),
    [
        ([], 1.0, "1 to 256"),
        ([[1]], 1.0, "at least 2"),
        ([[1, 100]], 1.0, "outside 0 to 99"),
        ([[1, 2]], 0.0, "above 0"),
    ],
)
async def test_logprobs_of_what_cannot_be(front: Front, ids: list[list[int]], temperature: float, what: str) -> None:
    await front.ready()
    request = trainer.ComputeLogprobsRequest(session_id=ID, temperature=temperature)
    for sequence in ids:
        request.sequences.add(ids=sequence)
    with pytest.raises(SurogateError, match=what):
        await front.stub.ComputeLogprobs(request)


async def test_nothing_is_left_in_memory(tmp_path: Path) -> None:
    async with serving(tmp_path) as front:
        await front.ready()
        assert list((tmp_path / "shm").iterdir())
    assert not list((tmp_path / "shm").iterdir())
