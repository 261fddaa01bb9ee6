"""The reward service of a running job is replaced, and another one is compared with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from orchestrator_svc.grpo.ledger import draws
from orchestrator_svc.jobs.context import WRITING_MODEL
from orchestrator_svc.jobstore import store
from orchestrator_svc.jobstore.reward_services import ReplacedService, replace_service
from orchestrator_svc.jobstore.schema import jobs
from orchestrator_svc.replace_reward import Needed, check_service, wanted_service
from surogate.errors import ConfigError, FailedPreconditionError, InvalidInputError, UnavailableError
from surogate.rollouts import read_steps
from surogate.v1 import job_pb2, reward_pb2, reward_pb2_grpc
from tests.contract.grpo.test_grpo_episodes import multi_turn
from tests.helpers.grpo.grpo_fakes import scores
from tests.helpers.grpo.grpo_job import GrpoJob, grpo_job, job_config
from tests.helpers.rpc import serving
from tests.helpers.waiting import until

FAKE = Needed("fake", multi_turn=False)


class OtherReward(reward_pb2_grpc.RewardServiceServicer):
    """Scores half of what the first service scores."""

    def __init__(self) -> None:
        self.groups = 0
        self.multi_turn = False

    async def ListEnvironments(
        self, request: reward_pb2.ListEnvironmentsRequest, context: Any
    ) -> reward_pb2.ListEnvironmentsResponse:
        listed = reward_pb2.Environment(id="fake", multi_turn=self.multi_turn)
        return reward_pb2.ListEnvironmentsResponse(environments=[listed])

    async def ScoreRollouts(
        self, request: reward_pb2.ScoreRolloutsRequest, context: Any
    ) -> reward_pb2.ScoreRolloutsResponse:
        self.groups += 1
        response = scores(request)
        for result in response.results:
            result.score.reward /= 2
        return response


@asynccontextmanager
async def other_service() -> AsyncIterator[tuple[str, OtherReward]]:
    servicer = OtherReward()
    add = reward_pb2_grpc.add_RewardServiceServicer_to_server
    async with serving(lambda server: server.add(add, servicer, "surogate.v1.RewardService")) as server:
        yield server.address, servicer


async def replace(job: GrpoJob, address: str, *, shadow: bool = False) -> None:
    await job.database.write(lambda c: replace_service(c, "job", ReplacedService("fake", shadow, address)))
    if job.ctx is not None:
        job.ctx.bell.ring("job")


async def noticed(job: GrpoJob, text: str) -> bool:
    return text in [event.notice.text for event in await job.events()]


def metrics(job: GrpoJob) -> list[dict[str, float]]:
    return [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]


async def test_groups_of_later_steps_are_scored_by_the_new_service_and_the_ledger_says_by_whom(tmp_path: Path) -> None:
    async with other_service() as (address, other), grpo_job(tmp_path) as (job, fakes):

        async def at_step_two(header: Any) -> None:
            if header.step == 2:
                await replace(job, address)
                await until(lambda: noticed(job, f"fake is scored by {address} from now on"))

        fakes.hooks.on["TrainStep done"] = at_step_two
        await job.run()
        query = select(draws.c.step, draws.c.scored_by).order_by(draws.c.ordinal)
        rows = await job.database.read(lambda c: c.execute(query).all())
        configured = "built-in"
        assert [by for step, by in rows if step <= 2] == [configured] * 4
        assert [by for step, by in rows if step > 2] == [address] * 4
        assert other.groups == 4
        stored = dict(read_steps(job.folder, columns=["scored_by", "reward"]))
        assert {row["scored_by"] for row in stored[4]} == {address}


async def test_groups_that_a_dead_service_was_asked_for_are_scored_by_the_one_that_takes_its_place(
    tmp_path: Path,
) -> None:
    async with other_service() as (address, _), grpo_job(tmp_path) as (job, fakes):
        asked = 0

        async def die(_: Any) -> None:
            nonlocal asked
            asked += 1
            if asked > 4:  # the groups of two steps were scored
                raise UnavailableError("the service is gone")

        fakes.hooks.on["ScoreRollouts"] = die
        running = asyncio.create_task(job.run())
        status = ""
        while "reward service" not in status:
            await asyncio.sleep(0.02)
            said = [event.state_changed for event in await job.events() if event.HasField("state_changed")]
            status = said[-1].status_message
        assert status == "waiting for the reward service of fake: the service is gone"
        row = await job.database.read(lambda c: store.get(c, "job"))
        assert row.eta_seconds is None, "nobody knows when it comes back"
        await replace(job, address)
        await running
        query = select(draws.c.step, draws.c.scored_by).order_by(draws.c.ordinal)
        rows = await job.database.read(lambda c: c.execute(query).all())
        assert [by for _, by in rows] == ["built-in"] * 4 + [address] * 4
        said = [event.state_changed for event in await job.events() if event.HasField("state_changed")]
        assert [change.status_message for change in said[-2:]] == ["training", WRITING_MODEL]


async def test_a_shadow_is_compared_and_never_trained_on(tmp_path: Path) -> None:
    async with other_service() as (address, other), grpo_job(tmp_path) as (job, fakes):
        await replace(job, address, shadow=True)

        async def at_step_two(header: Any) -> None:
            if header.step == 2:
                await until(lambda: other.groups >= 2)  # training does not wait for a shadow by itself

        fakes.hooks.on["TrainStep"] = at_step_two
        await job.run()
        assert {row["scored_by"] for _, rows in read_steps(job.folder) for row in rows} == {"built-in"}
        compared = [line for line in metrics(job) if line.get("shadow/fake/compared")]
        assert compared
        assert compared[0]["shadow/fake/correlation"] == pytest.approx(1.0)
        assert compared[0]["shadow/fake/agreement"] == 0
        weights = fakes.trainer.history[-1]
    async with grpo_job(tmp_path / "alone") as (job, fakes):
        await job.run()
        assert fakes.trainer.history[-1] == weights


async def test_what_cannot_be_is_refused_before_anything_changes(tmp_path: Path) -> None:
    async with other_service() as (address, _), grpo_job(tmp_path) as (job, fakes):
        with pytest.raises(InvalidInputError, match="no environment other"):
            await check_service(ReplacedService("fake", False, address), Needed("other", multi_turn=False))
        with pytest.raises(InvalidInputError, match="does not answer"):
            await check_service(ReplacedService("fake", False, fakes.addresses["trainer"][0]), FAKE)
        with pytest.raises(ConfigError, match="address"):
            await check_service(ReplacedService("fake", False, "nonsense"), FAKE)
        await check_service(ReplacedService("fake", False, address), FAKE)

        config = job_config(str(tmp_path / "model"))
        row = await job.database.read(lambda c: c.execute(select(jobs)).one())
        given = {**row._mapping, "config": config}
        service, environment_id = wanted_service(_Row(given), job_pb2.ReplaceRewardRequest(address=address))
        assert (service.environment, environment_id) == ("fake", FAKE)
        with pytest.raises(InvalidInputError, match="must be one of fake"):
            wanted_service(_Row(given), job_pb2.ReplaceRewardRequest(address=address, environment="nothing"))
        with pytest.raises(FailedPreconditionError, match="has ended"):
            wanted_service(_Row({**given, "state": job_pb2.Job.STATE_FAILED}), job_pb2.ReplaceRewardRequest())


@pytest.mark.parametrize("shadow", [False, True])
async def test_a_service_that_answers_no_turns_is_refused_for_a_job_of_episodes(tmp_path: Path, shadow: bool) -> None:
    async with other_service() as (address, other), grpo_job(tmp_path, max_steps=1) as (job, fakes):
        multi_turn(job, fakes)
        await job.run()
        row = await job.database.read(lambda c: c.execute(select(jobs)).one())
        given = {**row._mapping, "config": job_config(str(tmp_path / "model")), "state": job_pb2.Job.STATE_RUNNING}
        service, needed = wanted_service(_Row(given), job_pb2.ReplaceRewardRequest(address=address, shadow=shadow))
        assert needed == Needed("fake", multi_turn=True)
        with pytest.raises(InvalidInputError, match="answers no turns"):
            await check_service(service, needed)
        other.multi_turn = True
        await check_service(service, needed)


class _Row:
    """A row of the store with some values changed."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
