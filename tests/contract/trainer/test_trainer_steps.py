"""GRPO steps through the trainer's front: each trained once, in order, whatever the caller and the network do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from surogate.errors import (
    AlreadyExistsError,
    BusyError,
    CancelledError,
    FailedPreconditionError,
    InternalError,
    InvalidInputError,
    NotFoundError,
    OutOfRangeError,
)
from tests.helpers.trainer.trainer_front import Front, State, header, sample, serving, trained


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    async with serving(tmp_path) as front:
        yield front


async def test_steps_are_trained_in_order(front: Front) -> None:
    await front.ready()
    for step in (1, 2):
        response = await front.train(step, advantage=0.5)
        assert (response.step, response.metrics["loss"], response.repeated_call) == (step, 1.0, False)
    assert (await front.get()).step == 2
    assert front.trained() == ["1 a b", "2 a b"]


async def test_a_repeat_of_the_last_step_returns_its_stored_result(front: Front) -> None:
    await front.ready()
    first = await front.train(1, advantage=0.25)
    again = await front.train(1, advantage=0.25)
    assert again.repeated_call
    assert again.metrics == first.metrics
    assert front.trained() == ["1 a b"]


async def test_the_order_in_which_samples_arrive_does_not_matter(front: Front) -> None:
    await front.ready()
    await front.send([header(1, 2), trained([sample("z")]), trained([sample("a")])])
    assert (await front.train(1, ids=("a", "z"))).repeated_call
    assert front.trained() == ["1 a z"]


async def test_a_step_with_other_samples_than_before_is_refused(front: Front) -> None:
    await front.ready()
    await front.train(1)
    with pytest.raises(AlreadyExistsError, match="other samples") as refused:
        await front.train(1, advantage=2.0)
    assert refused.value.reason == "STEP_CONFLICT"


@pytest.mark.parametrize("step", [0, 1, 4])
async def test_a_gap_and_an_old_step_are_out_of_range(front: Front, step: int) -> None:
    await front.ready()
    await front.train(1)
    await front.train(2)
    with pytest.raises(OutOfRangeError, match="the next one is 3") as refused:
        await front.train(step)
    assert refused.value.reason == "STEP_OUT_OF_ORDER"
    assert refused.value.metadata["expected"] == "3"


async def test_a_repeat_while_the_step_runs_waits_for_the_same_result(front: Front) -> None:
    await front.ready()
    first, second = await asyncio.gather(front.train(1, ids=("slow",)), front.train(1, ids=("slow",)))
    assert first.metrics == second.metrics
    assert sorted([first.repeated_call, second.repeated_call]) == [False, True]
    assert front.trained() == ["1 slow"]


async def test_a_step_goes_on_when_its_caller_leaves(front: Front) -> None:
    await front.ready()
    call = front.stub.TrainStep(iter([header(1, 1), trained([sample("slow")])]), timeout=60)
    await front.until_begun(1)
    call.cancel()
    with suppress(asyncio.CancelledError, CancelledError):
        await call
    assert (await front.train(1, ids=("slow",))).repeated_call
    assert front.trained() == ["1 slow"]


async def test_get_answers_while_a_step_runs(front: Front) -> None:
    await front.ready()
    step = asyncio.create_task(front.train(1, ids=("hang",)))
    await front.until_begun(1)
    assert (await front.get()).step == 0
    assert not step.done()
    step.cancel()


async def test_samples_that_the_worker_refuses_do_not_end_the_session(front: Front) -> None:
    await front.ready()
    with pytest.raises(InvalidInputError, match="cannot be trained on"):
        await front.train(1, ids=("refuse",))
    assert (await front.train(1)).step == 1


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sample_id": ""}, "sample_id is empty"),
        ({"token_ids": [5, 6, 7]}, "3, 4 and 4 entries"),
        ({"token_ids": [5], "loss_mask": [True], "sampler_logprobs": [-1.0]}, "at least 2"),
        ({"token_ids": [5, -1, 7, 8]}, "from -1 to 8"),
        ({"token_ids": [5, 6, 7, 100]}, "0 to 99"),
        ({"token_ids": [1] * 65, "loss_mask": [False] * 65, "sampler_logprobs": [0.0] * 65}, "sequence_len allows 64"),
        ({"loss_mask": [True] * 4}, "first token"),
        ({"sampler_logprobs": [0, 0, float("nan"), -1]}, "finite"),
        ({"sampler_logprobs": [0, 0, float("-inf"), -1]}, "finite"),
        ({"sampler_logprobs": [0, 0, 0.5, -1]}, "at most 0"),
        ({"advantage": float("nan")}, "advantage is nan"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
    ],
)
async def test_a_sample_that_cannot_be_is_refused_by_name(front: Front, changes: dict[str, Any], what: str) -> None:
    await front.ready()
    bad = sample(**{"sample_id": "bad", **changes})
    with pytest.raises(InvalidInputError, match=what):
        await front.send([header(1, 2), trained([sample("good"), bad])])
    assert (await front.get()).step == 0


@pytest.mark.parametrize(
    ("requests", "what"),
    [
        ([], "no message"),
        ([trained([sample("a")])], "first message"),
        ([header(1, 1), header(1, 1)], "one header"),
        ([header(1, 0)], "1 to 3 samples"),
        ([header(1, 4)], "1 to 3 samples"),
        ([header(1, 2), trained([sample("a")])], "has 1 samples; its header says 2"),
        ([header(1, 1), trained([sample("a"), sample("b")])], "more samples than the 1"),
        ([header(1, 2), trained([sample("a"), sample("a")])], "'a' is twice"),
        ([header(1, 3), trained([sample("a"), sample("b"), sample("c")])], "more than 10 tokens"),
        ([header(1, 1), trained([sample("a", loss_mask=[False] * 4)])], "no token to train on"),
    ],
)
async def test_a_step_that_is_not_what_it_says_is_refused(tmp_path: Path, requests: list[Any], what: str) -> None:
    async with serving(tmp_path, max_step_samples=3, max_step_tokens=10) as front:
        await front.ready()
        with pytest.raises(InvalidInputError, match=what):
            await front.send(requests)


async def test_steps_need_a_session_that_is_ready_and_of_grpo(front: Front) -> None:
    with pytest.raises(NotFoundError, match="no session"):
        await front.train(1)
    await front.create("grpo", "loads-forever")
    with pytest.raises(FailedPreconditionError, match="LOADING"):
        await front.train(1)


async def test_a_session_of_pretraining_takes_no_steps(front: Front) -> None:
    await front.ready("pt")
    with pytest.raises(FailedPreconditionError, match="runs by itself"):
        await front.train(1)


async def test_after_a_resume_steps_go_on_from_the_checkpoint(front: Front) -> None:
    session = await front.ready(resume_from=str(front.output / "checkpoint-7"))
    assert (session.step, session.checkpoint_step) == (7, 7)
    with pytest.raises(OutOfRangeError, match="the next one is 8"):
        await front.train(7)
    assert (await front.train(8)).step == 8


@pytest.mark.parametrize(
    ("sample_id", "reason", "words"),
    [
        ("die", "WORKER_DIED", ["SIGKILL", "last words"]),
        ("crash", "WORKER_ERROR", ["RuntimeError", "the optimiser fell over"]),
        ("fork", "WORKER_DIED", ["SIGKILL"]),
    ],
)
async def test_a_worker_that_ends_in_a_step_fails_the_session(
    front: Front, sample_id: str, reason: str, words: list[str]
) -> None:
    await front.ready()
    await front.train(1)
    with pytest.raises(InternalError) as failed:
        await front.train(2, ids=(sample_id,))
    assert failed.value.reason == reason
    assert all(word in str(failed.value) for word in words)
    session = await front.get()
    assert (session.state, session.step) == (State.STATE_FAILED, 1)
    with pytest.raises(FailedPreconditionError, match="has failed") as refused:
        await front.train(2)
    assert refused.value.reason == "SESSION_FAILED"


async def test_a_worker_that_hangs_is_killed(tmp_path: Path) -> None:
    async with serving(tmp_path, step_timeout=5.0) as front:
        await front.ready()
        with pytest.raises(InternalError, match=r"said nothing for 5 s in train_step") as failed:
            await front.train(1, ids=("hang",))
        assert failed.value.reason == "WORKER_HUNG"
        assert (await front.get()).state == State.STATE_FAILED


async def test_only_so_many_steps_are_taken_in_at_once(front: Front) -> None:
    await front.ready()
    release = asyncio.Event()

    async def held_back() -> AsyncIterator[Any]:
        yield header(1, 1)
        await release.wait()
        yield trained([sample("a")])

    calls = [asyncio.ensure_future(_awaited(front.stub.TrainStep(held_back(), timeout=60))) for _ in range(4)]
    await asyncio.sleep(0.3)
    with pytest.raises(BusyError, match="try again"):
        await front.train(1, ids=("a",))
    release.set()
    assert sorted(answer.repeated_call for answer in await asyncio.gather(*calls)) == [False, True, True, True]


async def _awaited(call: Any) -> Any:
    return await call
