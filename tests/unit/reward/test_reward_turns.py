"""Environments that answer turns: the SDK's side, over gRPC, and the built-in `guess-number`."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from reward_svc.environments.guess_number import NO_NUMBER, GuessNumber
from reward_svc.environments.registry import built_in
from surogate.errors import (
    DeadlineError,
    InternalError,
    InvalidInputError,
    OutOfRangeError,
    SurogateError,
    UnimplementedError,
)
from surogate.reward import ChatMessage, Environment, EnvironmentArgs, Episode, Example, Rollout, reward
from surogate.reward.base import Split
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.structs import from_struct, to_struct
from surogate.v1 import reward_pb2, reward_pb2_grpc
from tests.helpers.reward.rewards import reward_server

ROOT = Path(__file__).parents[3]


class Countdown(Environment[EnvironmentArgs]):
    """Have the model say three, two, one."""

    id = "countdown"
    description = "Count down from three."
    args_model = EnvironmentArgs

    async def turn(self, args: EnvironmentArgs, example: Example, episode: Episode) -> str | None:
        left = episode.state.setdefault("left", ["three", "two", "one"])
        if left[0] in episode.completion:
            left.pop(0)
        return f"And after {episode.completion}?" if left else None

    def score(self, args: EnvironmentArgs, example: Example, rollout: Rollout) -> float:
        return 1 - len(from_struct(rollout.state)["left"]) / 3


class Odd(Environment[EnvironmentArgs]):
    """Does what its turn is told to do."""

    id = "odd"
    description = "Answers oddly."
    args_model = EnvironmentArgs
    together = threading.Barrier(4)

    def turn(self, args: EnvironmentArgs, example: Example, episode: Episode) -> Any:
        match episode.completion:
            case "sleep":
                time.sleep(1.0)
            case "wait for the others":
                self.together.wait(timeout=60)
            case "raise":
                raise ValueError("no such move")
            case "own error":
                raise OutOfRangeError("out of range")
            case "number":
                return 7
            case "nothing":
                return []
            case "bad state":
                episode.state["x"] = object()
            case "messages":
                return [ChatMessage(role="tool", content="4"), ChatMessage(role="user", content="And now?")]
        return "hm"

    def score(self, args: EnvironmentArgs, example: Example, rollout: Rollout) -> float:
        return 0.5


@reward("single")
def single(completion: str) -> float:
    """Scores a single completion."""
    return 1.0


@asynccontextmanager
async def stub() -> AsyncIterator[Any]:
    async with (
        reward_server(Countdown(), Odd(), single) as address,
        open_channel(address, ClientSecurity()) as channel,
    ):
        yield reward_pb2_grpc.EnvironmentServiceStub(channel)


def said(environment: str, *turns: str, seconds: float = 60.0, **others: Any) -> reward_pb2.TakeTurnRequest:
    request = reward_pb2.TakeTurnRequest(environment=environment, turn=len(turns), rollout_id="r", **others)
    request.messages.extend(ChatMessage(role="assistant", content=text) for text in turns)
    request.timeout.FromNanoseconds(int(seconds * 1e9))
    return request


async def test_an_episode_from_turn_to_turn() -> None:
    async with stub() as environment:
        first = await environment.TakeTurn(said("countdown", "three"))
        assert [(m.role, m.content) for m in first.messages] == [("user", "And after three?")]
        second = await environment.TakeTurn(said("countdown", "three", "two", state=first.state))
        again = await environment.TakeTurn(said("countdown", "three", "two", state=first.state))
        assert again == second, "the state is the caller's: a call that was cut off is made again"
        last = await environment.TakeTurn(said("countdown", "three", "two", "one", state=second.state))
        assert not last.messages
        assert from_struct(last.state) == {"left": []}
        rollout = Rollout(rollout_id="r", state=last.state)
        assert Countdown().score(EnvironmentArgs(), Example(), rollout) == 1.0


async def test_several_messages_of_any_role() -> None:
    async with stub() as environment:
        response = await environment.TakeTurn(said("odd", "messages"))
        assert [(m.role, m.content) for m in response.messages] == [("tool", "4"), ("user", "And now?")]


@pytest.mark.parametrize(
    ("completion", "error", "why"),
    [
        ("sleep", DeadlineError, "longer than its timeout"),
        ("raise", InternalError, "ValueError: no such move"),
        ("own error", OutOfRangeError, "out of range"),
        ("number", InternalError, "answered with 7"),
        ("nothing", InternalError, r"answered with \[\]"),
        ("bad state", InternalError, "JSON values"),
    ],
)
async def test_what_is_no_answer_is_an_error(completion: str, error: type[SurogateError], why: str) -> None:
    async with stub() as environment:
        with pytest.raises(error, match=why):
            await environment.TakeTurn(said("odd", completion, seconds=0.3 if completion == "sleep" else 60.0))
        assert (await environment.TakeTurn(said("odd", "fine"))).messages[0].content == "hm", "others are answered"


async def test_the_calculator_of_the_documentation() -> None:
    page = (ROOT / "docs" / "custom-rewards.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Calculator" in block)
    names: dict[str, Any] = {"__name__": "calculator"}
    exec(compile(code, "calculator", "exec"), names)
    calculator = names["Calculator"]()
    args, state = calculator.parse({}), {}
    for said, answer in (("add 3 4", "7"), ("The answer is 7.", None)):
        turn = Episode("r", 1, [ChatMessage(role="assistant", content=said)], state)
        found = await calculator.turn(args, Example(), turn)
        assert (found and found.content) == answer
    assert state == {"calls": 1}
    assert calculator.score(args, Example(answer="7"), Rollout(completion="The answer is 7.")) == 1.0


async def test_bad_calls_say_what_is_wrong() -> None:
    async with stub() as environment:
        with pytest.raises(UnimplementedError, match="single answers no turns"):
            await environment.TakeTurn(said("single", "x"))
        with pytest.raises(InvalidInputError, match="role assistant"):
            await environment.TakeTurn(said("odd"))
        with pytest.raises(InvalidInputError, match="timeout must be above 0"):
            await environment.TakeTurn(said("odd", "x", seconds=0))
        with pytest.raises(InvalidInputError, match="unknown argument"):
            await environment.TakeTurn(said("odd", "x", args=to_struct({"nope": 1})))


async def test_turns_of_several_episodes_are_answered_at_once() -> None:
    async with stub() as environment:
        calls = [environment.TakeTurn(said("odd", "wait for the others")) for _ in range(4)]
        assert [response.messages[0].content for response in await asyncio.gather(*calls)] == ["hm"] * 4


async def test_functions_are_given_what_an_episode_was() -> None:
    @reward("patience")
    def patience(conversation: list[ChatMessage], state: dict[str, Any]) -> float:
        """Turns that it took, and tries that are left."""
        return len(conversation) + state["left"] / 10

    rollout = Rollout(completion="b", state=to_struct({"left": 3}))
    rollout.messages.extend(ChatMessage(role=role, content="x") for role in ("assistant", "user", "assistant"))
    assert patience.score(patience.parse({}), Example(), rollout) == 3.3


async def test_an_environment_says_that_it_answers_turns() -> None:
    assert Countdown().describe().multi_turn
    assert not single.describe().multi_turn


def play(guesses: list[str], number: int = 42) -> tuple[list[str | None], reward_pb2.Score]:
    """What `guess-number` answers to guesses, and the score of the episode."""
    environment = GuessNumber()
    args, example = environment.parse({"span": 100}), Example(answer=str(number))
    episode = Episode("r", 0, [], {})
    answers = []
    for guess in guesses:
        episode.turn += 1
        episode.messages.append(ChatMessage(role="assistant", content=guess))
        answers.append(environment.turn(args, example, episode))
    return answers, environment.score(args, example, Rollout(state=to_struct(episode.state)))


def test_guess_number_answers_and_scores() -> None:
    answers, score = play(["50", "I say 30.", "none", "42"])
    assert answers == ["Lower.", "Higher.", NO_NUMBER, None]
    assert (score.reward, score.components["found"]) == (1.0, 1.0)
    assert play(["62", "22", "90"])[1].reward == pytest.approx(0.4), "the closest was 20 of 100 away"
    assert play(["?"])[1].reward == 0.0
    assert play(["9" * 399])[1].reward == 0.0


def test_guess_number_asks_for_numbers_of_the_range_that_it_names() -> None:
    environment = GuessNumber()
    args = environment.parse({"num_examples": 50, "span": 10})
    for example in environment.examples(args, Split.TRAIN, 0):
        fields = from_struct(example.fields)
        assert fields["low"] <= int(example.answer) <= fields["high"] == fields["low"] + 9
        assert f"from {fields['low']} to {fields['high']}" in example.prompt[0].content
    with pytest.raises(InvalidInputError, match="too large"):
        environment.parse({"span": 100, "max_value": 50})


def test_a_mixture_of_turns_is_refused() -> None:
    mixture = built_in(processes=1).get("mixture")
    with pytest.raises(InvalidInputError, match=r"parts\.0\.id.*answers turns"):
        list(mixture.examples(mixture.parse({"parts": [{"id": "guess-number"}]}), Split.TRAIN, 0))
