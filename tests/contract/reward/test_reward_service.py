"""The reward service over gRPC: scores, errors of one item, deadlines, and prompts."""

import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from reward_svc.environments.registry import built_in
from surogate.errors import InvalidInputError, NotFoundError, UnavailableError
from surogate.reward import metrics
from surogate.reward.base import Environment, EnvironmentArgs, Split
from surogate.reward.lifespan import serving
from surogate.reward.registry import Registry
from surogate.reward.settings import RewardSettings
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.rpc.server import RpcServer
from surogate.rpc.status import from_status
from surogate.v1 import reward_pb2, reward_pb2_grpc


class Moody(Environment[EnvironmentArgs]):
    """Does with a completion what it says: `hang` until released, `crash`, `nan`, or 1."""

    id = "moody"
    description = "For tests."
    args_model = EnvironmentArgs

    def __init__(self) -> None:
        self.release = threading.Event()

    def examples(self, args: EnvironmentArgs, split: Split, seed: int) -> Iterator[reward_pb2.Example]:
        return iter(())

    def score(self, args: Any, example: reward_pb2.Example, rollout: reward_pb2.Rollout) -> reward_pb2.Score:
        if rollout.completion == "hang":
            self.release.wait()
        if rollout.completion == "crash":
            raise ZeroDivisionError("oops")
        return reward_pb2.Score(reward=float("nan") if rollout.completion == "nan" else 1.0)


@pytest.fixture
async def moody() -> AsyncIterator[Moody]:
    environment = Moody()
    yield environment
    environment.release.set()


@pytest.fixture
async def server(moody: Moody) -> AsyncIterator[RpcServer]:
    settings = RewardSettings(workers=2, max_hung=3)
    server = RpcServer(settings)
    async with serving(server, settings, Registry((*built_in().usable(), moody))):
        await server.start()
        yield server
        await server.stop()


@pytest.fixture
async def channel(server: RpcServer) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(server.address, ClientSecurity()) as channel:
        yield channel


@pytest.fixture
def reward(channel: grpc.aio.Channel) -> Any:
    return reward_pb2_grpc.RewardServiceStub(channel)


@pytest.fixture
def environments(channel: grpc.aio.Channel) -> Any:
    return reward_pb2_grpc.EnvironmentServiceStub(channel)


def group(environment: str, *completions: str, answer: str = "", **fields: Any) -> reward_pb2.ScoreRolloutsRequest:
    rollouts = [reward_pb2.Rollout(rollout_id=f"r{i}", completion=text) for i, text in enumerate(completions)]
    request = reward_pb2.ScoreRolloutsRequest(environment=environment, rollouts=rollouts, **fields)
    request.example.answer = answer
    return request


def outcomes(response: reward_pb2.ScoreRolloutsResponse) -> list[float | str]:
    """The reward of each rollout, or the reason of its error."""
    return [
        item.score.reward if item.HasField("score") else from_status(item.error).reason for item in response.results
    ]


async def test_lists_environments(reward: Any) -> None:
    listed = (await reward.ListEnvironments(reward_pb2.ListEnvironmentsRequest())).environments
    ids = [item.id for item in listed]
    assert ids[:3] == ["reverse-text", "arithmetic", "exact-match"] and ids[-1] == "moody"
    assert all(item.has_examples and item.deterministic and item.max_reward == 1 for item in listed[:3])


async def test_scores_a_group_in_order(reward: Any) -> None:
    response = await reward.ScoreRollouts(group("reverse-text", "cba", "", "cb", answer="cba"))
    assert [item.rollout_id for item in response.results] == ["r0", "r1", "r2"]
    assert outcomes(response) == [1.0, 0.0, 0.8]


async def test_prompts_come_in_order_and_are_scored_by_their_answer(reward: Any, environments: Any) -> None:
    request = reward_pb2.ListExamplesRequest(
        environment="arithmetic", split=reward_pb2.ListExamplesRequest.SPLIT_TRAIN, seed=5, max_examples=300
    )
    request.args["max_value"] = 50
    examples = [example async for example in environments.ListExamples(request)]
    assert len(examples) == 300
    request.max_examples = 10
    assert [example async for example in environments.ListExamples(request)] == examples[:10]
    scored = group("arithmetic", f"It is {examples[0].answer}.")
    scored.example.CopyFrom(examples[0])
    assert outcomes(await reward.ScoreRollouts(scored)) == [1.0]


async def test_a_rollout_that_cannot_be_scored_is_an_error_item(reward: Any) -> None:
    response = await reward.ScoreRollouts(group("moody", "fine", "crash", "nan", "fine"))
    assert outcomes(response) == [1.0, "INTERNAL", "INTERNAL", 1.0]
    assert "ZeroDivisionError: oops" in response.results[1].error.message


async def test_an_item_that_hangs_costs_only_itself(reward: Any) -> None:
    timeout = Duration(seconds=3)
    response = await reward.ScoreRollouts(group("moody", "fine", "hang", "fine", item_timeout=timeout))
    assert outcomes(response) == [1.0, "DEADLINE_EXCEEDED", 1.0]
    assert outcomes(await reward.ScoreRollouts(group("arithmetic", "7", answer="7"))) == [1.0]


async def test_a_call_given_up_by_its_caller_frees_its_worker(reward: Any) -> None:
    for _ in range(2):  # as many as there are workers
        with pytest.raises(Exception, match=r"(?i)deadline"):
            await reward.ScoreRollouts(group("moody", "hang"), timeout=0.3)
    assert outcomes(await reward.ScoreRollouts(group("moody", "fine"))) == [1.0]


async def test_too_many_hung_scorings_end_the_service(reward: Any, server: RpcServer) -> None:
    timeout = Duration(nanos=100_000_000)
    response = await reward.ScoreRollouts(group("moody", "hang", "hang", item_timeout=timeout))
    assert outcomes(response) == ["DEADLINE_EXCEEDED"] * 2
    with pytest.raises(UnavailableError, match="must be restarted"):
        await reward.ScoreRollouts(group("moody", "hang", "fine", item_timeout=timeout))
    assert "3 scorings hang" in str(await server.failed())


async def test_hung_scorings_that_end_after_all_are_forgiven(reward: Any, moody: Moody) -> None:
    timeout = Duration(nanos=100_000_000)
    for _ in range(5):
        response = await reward.ScoreRollouts(group("moody", "hang", item_timeout=timeout))
        assert outcomes(response) == ["DEADLINE_EXCEEDED"]
        moody.release.set()
        until_none_hangs()
        moody.release.clear()


def until_none_hangs() -> None:
    """Waits for the threads of scorers that were given up, which need no event loop for that."""
    while metrics.HUNG.collect()[0].samples[0].value:
        time.sleep(0.01)


async def test_bad_requests_say_what_is_wrong(reward: Any, environments: Any) -> None:
    with pytest.raises(NotFoundError, match="this service has reverse-text, arithmetic"):
        await reward.ScoreRollouts(group("revers-text", "x"))
    with pytest.raises(InvalidInputError, match="1 to 1024 rollouts"):
        await reward.ScoreRollouts(group("reverse-text"))
    with pytest.raises(InvalidInputError, match="item_timeout"):
        await reward.ScoreRollouts(group("reverse-text", "x", item_timeout=Duration(seconds=-1)))
    with pytest.raises(InvalidInputError, match="item_timeout"):
        await reward.ScoreRollouts(group("reverse-text", "x", item_timeout=Duration(seconds=-(2**63))))
    for seconds in (2**31, 2**63 - 1):  # longer than a thread can wait for, or Python's timedelta can say
        response = await reward.ScoreRollouts(group("moody", "fine", item_timeout=Duration(seconds=seconds)))
        assert response.results[0].HasField("score")
    with pytest.raises(InvalidInputError, match="SPLIT_TRAIN"):
        [item async for item in environments.ListExamples(reward_pb2.ListExamplesRequest(environment="arithmetic"))]


async def test_bad_arguments_name_the_yaml_key(reward: Any) -> None:
    request = group("reverse-text", "x", answer="x")
    request.args["max_wrds"] = 3
    with pytest.raises(InvalidInputError) as caught:
        await reward.ScoreRollouts(request)
    (violation,) = caught.value.violations
    assert violation.field == "env[].args.max_wrds"
    assert "did you mean max_words?" in violation.description
