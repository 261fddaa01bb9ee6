"""What the services can do wrong, and what the loop makes of it: never a made-up reward, never a lost prompt."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from surogate.errors import (
    BusyError,
    CancelledError,
    ConfigError,
    InternalError,
    InvalidInputError,
    NotFoundError,
    SurogateError,
    UnavailableError,
    Violation,
)
from surogate.rpc.status import to_status
from surogate.v1 import common_pb2, reward_pb2
from tests.helpers.grpo.grpo_fakes import Fakes, completions, scores
from tests.helpers.grpo.grpo_job import GrpoJob, grpo_job


def broken_group(request: reward_pb2.ScoreRolloutsRequest, number: int) -> bool:
    """Whether a request is about the group of that ordinal."""
    return request.group_id == f"{number:09d}"


async def causes(job: GrpoJob) -> Counter[str]:
    """Draws by how they ended."""
    return Counter(row.cause or row.state for row in await job.draws())


async def notices(job: GrpoJob) -> str:
    """All notices of the job."""
    return "\n".join(event.notice.text for event in await job.events() if event.HasField("notice"))


def answering(fakes: Fakes, change: Any, *, groups: tuple[int, ...] = (1,)) -> None:
    """Has the reward service answer wrongly about some groups."""

    async def hook(request: reward_pb2.ScoreRolloutsRequest) -> reward_pb2.ScoreRolloutsResponse | None:
        if not any(broken_group(request, number) for number in groups):
            return None
        response = scores(request)
        change(response)
        return response

    fakes.hooks.on["ScoreRollouts"] = hook


def one_nan(response: reward_pb2.ScoreRolloutsResponse) -> None:
    response.results[0].score.reward = math.nan


def one_error(response: reward_pb2.ScoreRolloutsResponse) -> None:
    response.results[0].error.CopyFrom(to_status(InternalError("the checker crashed")))


def one_unanswered(response: reward_pb2.ScoreRolloutsResponse) -> None:
    response.results[0].ClearField("outcome")


def all_infinite(response: reward_pb2.ScoreRolloutsResponse) -> None:
    for result in response.results:
        result.score.reward = math.inf


def all_immense(response: reward_pb2.ScoreRolloutsResponse) -> None:
    for result in response.results:
        result.score.reward = 1.7e308


def one_too_few(response: reward_pb2.ScoreRolloutsResponse) -> None:
    del response.results[-1]


def one_twice(response: reward_pb2.ScoreRolloutsResponse) -> None:
    response.results[1].CopyFrom(response.results[0])


def in_another_order(response: reward_pb2.ScoreRolloutsResponse) -> None:
    response.results[0].rollout_id, response.results[1].rollout_id = (
        response.results[1].rollout_id,
        response.results[0].rollout_id,
    )


def all_equal(response: reward_pb2.ScoreRolloutsResponse) -> None:
    for result in response.results:
        result.score.reward = 0.5


@pytest.mark.parametrize("change", [one_nan, one_error, one_unanswered])
async def test_a_rollout_without_a_reward_is_left_out_of_its_group(tmp_path: Path, change: Any) -> None:
    async with grpo_job(tmp_path, max_steps=1) as (job, fakes):
        answering(fakes, change)
        await job.run()
        assert await causes(job) == {"trained": 2}
        step = next(event.step_completed for event in await job.events() if event.HasField("step_completed"))
        assert step.metrics["reward/mean"] > 0.1
        assert "the first failure: environment fake:" in await notices(job)


@pytest.mark.parametrize("change", [all_infinite, all_immense, one_too_few, one_twice, in_another_order])
async def test_a_group_that_makes_no_sense_is_dropped_and_replaced(tmp_path: Path, change: Any) -> None:
    async with grpo_job(tmp_path, max_steps=2, refill_rounds=1) as (job, fakes):
        answering(fakes, change)
        await job.run()
        assert await causes(job) == {"trained": 4, "reward": 1}
        assert [len(prompts) for _, prompts in await job.rows()] == [2, 2]
        assert "1 groups were dropped" in await notices(job)


async def test_without_refill_the_step_trains_on_what_is_left(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, max_steps=2) as (job, fakes):
        answering(fakes, all_infinite)
        await job.run()
        assert [len(prompts) for _, prompts in await job.rows()] == [1, 2]


async def test_groups_without_signal_are_replaced(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, max_steps=1, refill_rounds=2) as (job, fakes):
        answering(fakes, all_equal, groups=(0, 1, 2))
        await job.run()
        assert await causes(job) == {"trained": 2, "zero_signal": 3}
        step = next(event.step_completed for event in await job.events() if event.HasField("step_completed"))
        assert step.metrics["groups/zero_signal"] == 3


async def test_fails_by_name_when_no_group_ever_has_signal(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, refill_rounds=2) as (job, fakes):
        answering(fakes, all_equal, groups=tuple(range(100)))
        with pytest.raises(
            Exception, match=r"step 1 has nothing to train on: all 6 prompts were dropped \(6 for zero_signal\)"
        ):
            await job.run()
        assert {row.state for row in await job.draws()} == {"dropped"}


async def test_fails_by_name_when_the_reward_service_always_answers_nonsense(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, refill_rounds=4) as (job, fakes):
        answering(fakes, one_too_few, groups=tuple(range(100)))
        with pytest.raises(Exception, match=r"nothing to train on.*asked about 4 rollouts and answered 3"):
            await job.run()
        assert fakes.trainer.history == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotFoundError("no environment 'fake'"), "orch.env.0.id: no environment 'fake'"),
        (
            InvalidInputError("empty", violations=[Violation("env[].args.dataset", "a.jsonl is empty")]),
            "orch.env.0.args.dataset: a.jsonl is empty",
        ),
    ],
)
async def test_what_a_reward_service_refuses_has_the_key_of_the_users_file(
    tmp_path: Path, error: SurogateError, said: str
) -> None:
    async with grpo_job(tmp_path) as (job, fakes):

        async def refuse(_: object) -> None:
            raise error

        fakes.hooks.on["ListExamples"] = refuse
        with pytest.raises(ConfigError) as raised:
            await job.run()
        assert str(raised.value) == said


def sending(fakes: Fakes, *examples: tuple[str, str]) -> None:
    """Has the service send these examples, by id and prompt; no prompt where that is empty."""

    async def hook(_: object) -> list[reward_pb2.Example]:
        return [
            reward_pb2.Example(id=name, prompt=[common_pb2.ChatMessage(role="user", content=text)] if text else [])
            for name, text in examples
        ]

    fakes.hooks.on["ListExamples"] = hook


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([("a", "1"), ("a", "2")], "two examples have the id 'a'"),
        ([("a", "1"), ("b", "")], "the example with the id 'b' has no prompt"),
        ([(str(number), "x" * 1000) for number in range(20)], "more than 0 MiB of examples came"),
    ],
)
async def test_examples_that_cannot_be_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: list[tuple[str, str]], said: str
) -> None:
    monkeypatch.setattr("orchestrator_svc.grpo.prompts.gathered.MAX_BYTES", 10_000)
    async with grpo_job(tmp_path) as (job, fakes):
        sending(fakes, *examples)
        with pytest.raises(ConfigError, match=rf"orch\.env\.0: environment fake: {said}"):
            await job.run()


async def test_of_examples_without_end_no_more_are_taken_than_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator_svc.grpo.prompts.gathered.MAX_EXAMPLES", 30)
    message = common_pb2.ChatMessage(role="user", content="again")

    async def endless(_: object) -> Iterator[reward_pb2.Example]:
        return (reward_pb2.Example(id=str(number), prompt=[message]) for number in itertools.count())

    async with grpo_job(tmp_path, max_steps=1) as (job, fakes):
        fakes.hooks.on["ListExamples"] = endless
        await job.run()
        assert await causes(job) == {"trained": 2}


async def test_an_environment_that_fails_at_the_start_is_named(tmp_path: Path) -> None:
    async with grpo_job(tmp_path) as (job, fakes):

        async def fail(_: object) -> None:
            raise InternalError("no such table")

        fakes.hooks.on["ListExamples"] = fail
        with pytest.raises(InternalError, match=r"orch\.env\.0: environment fake cannot be opened: .*no such table"):
            await job.run()


async def test_a_reward_service_that_hangs_costs_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator_svc.grpo.rewards.scoring.GRACE", 1.0)
    async with grpo_job(tmp_path, max_steps=1, item_timeout=2.0) as (job, fakes):

        async def hang(request: reward_pb2.ScoreRolloutsRequest) -> None:
            if broken_group(request, 1):
                await asyncio.Event().wait()

        fakes.hooks.on["ScoreRollouts"] = hang
        await job.run()
        assert await causes(job) == {"trained": 1, "reward": 1}
        assert "environment fake: the reward service failed: it did not answer within" in await notices(job)


async def test_a_reward_service_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, max_steps=1) as (job, fakes):

        async def away(_: object) -> None:
            if fakes.hooks.calls["ScoreRollouts"] <= 3:
                raise UnavailableError("restarting")

        fakes.hooks.on["ScoreRollouts"] = away
        await job.run()
        assert await causes(job) == {"trained": 2}


async def test_a_busy_replica_is_asked_again(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, max_steps=1) as (job, fakes):

        async def busy(_: object) -> None:
            if fakes.hooks.calls["GenerateRollouts"] <= 2:
                raise BusyError("the queue is full", retry_after=0.05)

        fakes.hooks.on["GenerateRollouts"] = busy
        await job.run()
        assert await causes(job) == {"trained": 2}


async def test_a_replica_that_restarts_is_given_the_weights_before_traffic(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, replicas=2, max_steps=4) as (job, fakes):
        restarted: list[int] = []

        async def restart(request: Any) -> None:
            if request.min_policy_version == 2 and not restarted:
                restarted.append(2)
                fakes.inference[0].restart()
                fakes.inference[1].restart()

        fakes.hooks.on["GenerateRollouts"] = restart
        await job.run()
        assert [row.oldest_version for row in await job.draws()] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [replica.version for replica in fakes.inference] == [4, 4]


async def test_aborted_rollouts_are_not_trained_on(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, max_steps=1) as (job, fakes):

        async def abort(request: Any) -> Any:
            response = completions(request, 0)
            response.completions[2].finish_reason = common_pb2.FINISH_REASON_ABORTED
            return response

        fakes.hooks.on["GenerateRollouts"] = abort
        seen: list[int] = []

        async def count(header: Any) -> None:
            seen.append(header.num_samples)

        fakes.hooks.on["TrainStep"] = count
        await job.run()
        assert seen == [6]


async def test_rollouts_that_are_too_old_are_dropped_and_replaced(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, max_async_level=1, max_off_policy_steps=1, refill_rounds=2) as (job, fakes):

        async def old(request: Any) -> Any:
            # The third group says that its first token is older than it may be for step 3.
            return completions(request, 0) if request.request_id == f"{4:09d}" else None

        fakes.hooks.on["GenerateRollouts"] = old
        await job.run()
        stale = [row for row in await job.draws() if row.cause == "stale"]
        assert [(row.ordinal, row.step, row.oldest_version) for row in stale] == [(4, 3, 0)]
        assert [len(prompts) for _, prompts in await job.rows()] == [2] * 4


async def test_oversampling_takes_the_first_and_ends_the_rest(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, max_steps=2, oversampling_factor=2.0) as (job, _):
        await job.run()
        assert await causes(job) == {"trained": 4, "surplus": 4}
        assert [len(prompts) for _, prompts in await job.rows()] == [2, 2]


async def test_a_push_that_fails_on_one_replica_is_made_up_for(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, replicas=2) as (job, fakes):
        failed: list[str] = []

        async def fail_once(request: Any) -> Any:
            if request.version == 2 and not failed:
                failed.append(request.targets[0])
                return {request.targets[0]: InternalError("the commit failed")}
            return None

        fakes.hooks.on["PushWeights"] = fail_once
        await job.run()
        assert failed
        assert [replica.version for replica in fakes.inference] == [4, 4]
        assert [row.oldest_version for row in await job.draws()] == [0, 0, 1, 1, 2, 2, 3, 3]


async def test_a_push_that_always_fails_fails_the_job_and_leaves_the_old_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator_svc.grpo.rollouts.replicas.PUSH_PAUSE", 0.01)
    async with grpo_job(tmp_path, replicas=2) as (job, fakes):

        async def fail(request: Any) -> Any:
            return {target: InternalError("no room in /dev/shm") for target in request.targets if request.version == 2}

        fakes.hooks.on["PushWeights"] = fail
        with pytest.raises(Exception, match=r"no inference replica took policy version 2: .*no room in /dev/shm"):
            await job.run()
        assert [replica.version for replica in fakes.inference] == [1, 1]
        assert {row.state for row in await job.draws()} <= {"trained", "dropped"}


async def test_a_push_cut_off_after_its_commit_is_not_repeated_in_vain(tmp_path: Path) -> None:
    async with grpo_job(tmp_path) as (job, fakes):

        async def lose_answer(request: Any) -> None:
            if request.version == 2 and fakes.hooks.calls["PushWeights done"] == 2:
                raise UnavailableError("the connection broke")

        fakes.hooks.on["PushWeights done"] = lose_answer
        await job.run()
        assert fakes.inference[0].version == 4


async def test_a_lost_answer_of_a_step_does_not_train_it_twice(tmp_path: Path) -> None:
    async with grpo_job(tmp_path) as (job, fakes):

        async def lose_answer(header: Any) -> None:
            if header.step == 2:
                raise UnavailableError("the connection broke")

        fakes.hooks.on["TrainStep done"] = lose_answer
        await job.run()
        assert [step for step, _ in fakes.trainer.history] == [1, 2, 3, 4]


async def test_a_trainer_that_fails_every_time_fails_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator_svc.grpo.trainer.RECOVERY_PAUSE", 0.01)
    async with grpo_job(tmp_path) as (job, fakes):

        async def die(header: Any) -> None:
            if header.step == 2:
                raise InternalError("the training worker was killed by SIGKILL", reason="WORKER_DIED")

        fakes.hooks.on["TrainStep"] = die
        with pytest.raises(InternalError, match="killed by SIGKILL"):
            await job.run()
        assert [step for step, _ in fakes.trainer.history] == [1]


async def test_a_cancelled_job_saves_what_it_has_and_ends_its_draws(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, max_steps=50, max_async_level=1) as (job, fakes):

        async def cancel(header: Any) -> None:
            if header.step == 3:
                assert job.ctx is not None
                job.ctx.mark_cancelling()

        fakes.hooks.on["TrainStep"] = cancel
        with pytest.raises(CancelledError):
            await job.run()
        newest, weights = fakes.trainer.history[-1]
        assert fakes.trainer.disk.checkpoints[f"checkpoint-{newest}"] == (newest, weights)
        assert {row.state for row in await job.draws()} <= {"trained", "dropped"}
        assert fakes.trainer.session is None
