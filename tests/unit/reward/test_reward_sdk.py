"""The SDK: functions as environments, what they are given, and what is refused."""

import asyncio
from importlib.metadata import EntryPoint

import pytest
from google.protobuf.duration_pb2 import Duration

from surogate.errors import FailedPreconditionError, UnimplementedError
from surogate.reward import DatasetArgs, Environment, EnvironmentArgs, Score, Split, group_reward, reward
from surogate.reward.registry import Registry
from tests.helpers.reward.rewards import group, outcomes, reward_stub

ROWS = [{"prompt": f"Say {n}.", "answer": str(n), "level": n % 3} for n in range(30)]


class Args(DatasetArgs):
    bonus: float = 0.0


@reward("says", args=Args, examples=ROWS, max_reward=2)
def says(completion: str, answer: str, args: Args, fields: dict) -> Score:
    """Say what the answer is.

    More words.
    """
    return Score(reward=float(completion == answer) + args.bonus, components={"level": fields.get("level", 0)})


@reward("later")
async def later(completion: str) -> float:
    await asyncio.sleep(float(completion))
    return 1


@group_reward("longest", deterministic=False)
def longest(completions: list[str]) -> list[float]:
    most = max(map(len, completions))
    return [len(text) / most for text in completions]


@group_reward("short-answer")
async def too_few(rollouts: list) -> list[float]:
    return [1.0]


BROKEN = {
    "nan": lambda: float("nan"),
    "immense": lambda: 1e300,
    "inf part": lambda: Score(reward=1, components={"x": float("inf")}),
    "text": lambda: "1.0",
    "nothing": lambda: None,
    "raise": lambda: 1 / 0,
}


@reward("broken")
def broken(completion: str) -> object:
    return BROKEN[completion]()


def test_a_decorated_function_is_still_a_function() -> None:
    assert longest(["a", "ab"]) == [0.5, 1.0]


def test_it_describes_itself() -> None:
    about = says.describe()
    assert (about.id, about.description, about.has_examples) == ("says", "Say what the answer is.", True)
    assert about.max_reward == 2 and not about.HasField("min_reward") and about.deterministic
    assert not longest.describe().deterministic and not longest.describe().has_examples


def test_rows_become_examples_of_two_splits() -> None:
    args = says.parse({"system_prompt": "Obey."})
    train, held_out = (list(says.examples(args, split, 1)) for split in Split)
    assert len(train) == 27 and len(held_out) == 3
    assert {example.answer for example in train + held_out} == {row["answer"] for row in ROWS}
    assert [message.role for message in train[0].prompt] == ["system", "user"]
    assert train[0].fields["level"] == int(train[0].answer) % 3


def test_a_reward_without_rows_has_no_prompts() -> None:
    with pytest.raises(UnimplementedError, match="no prompts without"):
        longest.examples(longest.parse({}), Split.TRAIN, 0)
    with pytest.raises(UnimplementedError, match="not on its machine"):
        longest.examples(longest.parse({"dataset": "/no/such.jsonl"}), Split.TRAIN, 0)


async def test_functions_score_over_grpc() -> None:
    async with reward_stub(says, longest, later) as stub:
        request = group("says", "3", "4", answer="3", args={"bonus": 0.5}, fields={"level": 2})
        response = await stub.ScoreRollouts(request)
        assert outcomes(response) == [1.5, 0.5]
        assert response.results[0].score.components == {"level": 2}
        assert outcomes(await stub.ScoreRollouts(group("longest", "ab", "abcd"))) == [0.5, 1.0]
        assert outcomes(await stub.ScoreRollouts(group("later", "0", "0.01"))) == [1.0, 1.0]


async def test_a_late_async_reward_costs_only_itself_and_is_not_counted_as_hung() -> None:
    async with reward_stub(later, max_hung=1) as stub:
        request = group("later", "0", "300", "300", "0", item_timeout=Duration(seconds=3))
        assert outcomes(await stub.ScoreRollouts(request)) == [1, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", 1]
        assert outcomes(await stub.ScoreRollouts(group("later", "0"))) == [1]


async def test_what_is_no_reward_is_an_error_of_its_rollout() -> None:
    async with reward_stub(broken, too_few) as stub:
        response = await stub.ScoreRollouts(group("broken", *BROKEN))
        assert outcomes(response) == ["INTERNAL"] * len(BROKEN)
        said = " | ".join(result.error.message for result in response.results)
        for text in (
            "nan, which no reward",
            "inf, which no reward",
            "1e+300, beyond 1e+15",
            "a str",
            "a NoneType",
            "ZeroDivisionError",
        ):
            assert text in said
        response = await stub.ScoreRollouts(group("short-answer", "a", "b"))
        assert outcomes(response) == ["INTERNAL"] * 2
        assert "1 rewards" in response.results[1].error.message


def test_a_parameter_that_cannot_be_given_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="a reward cannot be given 'completed'"):

        @reward("typo")
        def typo(completed: str) -> float:
            return 1.0


class NoScore(Environment[EnvironmentArgs]):
    id, description, args_model = "no-score", "Nothing.", EnvironmentArgs


def test_the_registry_refuses_what_cannot_be_served() -> None:
    with pytest.raises(TypeError, match="neither score nor score_group"):
        Registry([NoScore()])
    with pytest.raises(ValueError, match="two environments"):
        Registry([says, says])
    with pytest.raises(TypeError, match="not an environment"):
        Registry([len])


def test_environments_of_packages() -> None:
    here = "tests.unit.reward.test_reward_sdk"
    plugins = [
        EntryPoint("longest", f"{here}:longest", "surogate.environments"),
        EntryPoint("says", f"{here}:longest", "surogate.environments"),  # hidden by the one that is there
        EntryPoint("other-id", f"{here}:later", "surogate.environments"),
        EntryPoint("gone", "no_such_module:x", "surogate.environments"),
    ]
    registry = Registry([says], plugins=plugins)
    assert registry.get("says") is says
    assert registry.get("longest").id == "longest"
    assert [environment.id for environment in registry.usable()] == ["says", "longest"]
    with pytest.raises(FailedPreconditionError, match="make them equal"):
        registry.get("other-id")
    with pytest.raises(FailedPreconditionError, match="No module named 'no_such_module'"):
        registry.get("gone")
