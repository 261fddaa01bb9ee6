"""Environments of the `verifiers` package: prompts, turns and rewards through the contract; skipped without it."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import types
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from reward_svc.adapters.kept import Kept
from reward_svc.environments.registry import built_in
from reward_svc.environments.verifiers_environments import Verifiers, installed_packages
from surogate.errors import FailedPreconditionError, InternalError, InvalidInputError, NotFoundError
from surogate.reward.base import Split
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.structs import from_struct, to_struct
from surogate.v1 import common_pb2, reward_pb2, reward_pb2_grpc
from tests.helpers.reward.rewards import group, outcomes, reward_server

MISSING = importlib.util.find_spec("verifiers") is None
needs_verifiers = pytest.mark.skipif(MISSING, reason="needs the extra `verifiers`, in an environment without vLLM")

SINGLE = '''
import verifiers as vf
from datasets import Dataset

def load_environment(count=20, fails=False):
    def exact(completion, answer, info):
        """Whether the answer is there."""
        if fails:
            raise RuntimeError("no such judge")
        return float(answer in completion[-1].content) * info["weight"]

    async def length(completion):
        return len(completion[-1].content)

    rows = [{"question": f"{n} + 1?", "answer": str(n + 1), "info": {"weight": 0.5}} for n in range(count)]
    rubric = vf.Rubric(funcs=[exact, length], weights=[1.0, 0.0])
    return vf.SingleTurnEnv(dataset=Dataset.from_list(rows), rubric=rubric, system_prompt="Add.")
'''

COMPARED = """
import verifiers as vf
from datasets import Dataset

def load_environment():
    def longest(completions, **kwargs):
        texts = [c[-1].content for c in completions]
        return [float(len(text) == max(map(len, texts))) for text in texts]

    data = Dataset.from_list([{"question": "Talk.", "answer": ""}] * 10)
    return vf.SingleTurnEnv(dataset=data, eval_dataset=data.select(range(2)), rubric=vf.Rubric(funcs=[longest]))
"""

GAME = """
import verifiers as vf
from datasets import Dataset

class Countdown(vf.MultiTurnEnv):
    async def setup_state(self, state):
        state["left"] = ["three", "two", "one"]
        return state

    async def env_response(self, messages, state, **kwargs):
        said = messages[-1].content
        if said == "crash":
            raise RuntimeError("board on fire")
        if state["left"] and state["left"][0] in said:
            state["left"].pop(0)
        if not state["left"]:
            state["final_env_response"] = [{"role": "user", "content": "Done."}]
        return [{"role": "user", "content": f"{len(state['left'])} to go"}]

def load_environment(max_turns=5):
    def done(state):
        return 1 - len(state["left"]) / 3

    data = Dataset.from_list([{"question": f"Count down, {n}.", "answer": ""} for n in range(20)])
    return Countdown(max_turns=max_turns, dataset=data, rubric=vf.Rubric(funcs=[done]))
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environments above, installed as modules."""
    for name, source in (("vf_single", SINGLE), ("vf_compared", COMPARED), ("vf_game", GAME)):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))


@asynccontextmanager
async def service() -> AsyncIterator[tuple[Any, Any]]:
    """Stubs of both services over one `verifiers`."""
    async with reward_server(Verifiers()) as address, open_channel(address, ClientSecurity()) as channel:
        yield reward_pb2_grpc.RewardServiceStub(channel), reward_pb2_grpc.EnvironmentServiceStub(channel)


def examples(args: dict[str, Any], split: Split = Split.TRAIN) -> list[reward_pb2.Example]:
    environment = Verifiers()
    return list(environment.examples(environment.parse(args), split, 0))


@pytest.mark.skipif(not MISSING, reason="verifiers is installed")
def test_without_the_package_it_says_what_to_install() -> None:
    with pytest.raises(FailedPreconditionError, match=r"pip install 'surogate\[verifiers\]'"):
        examples({"id": "my-env"})


def test_a_version_without_environments_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers", types.ModuleType("verifiers"))
    monkeypatch.setattr("reward_svc.adapters.verifiers_episodes.version", lambda _: "0.4.0")
    with pytest.raises(FailedPreconditionError, match=r"verifiers 0\.4\.0 .* pip install 'surogate\[verifiers\]'"):
        examples({"id": "my-env"})


def test_ids_are_names_of_packages() -> None:
    for wrong in ("", "../x", "a/b", "a b"):
        with pytest.raises(InvalidInputError, match=r"env\[\]\.args\.id"):
            Verifiers().parse({"id": wrong})


@needs_verifiers
@pytest.mark.usefixtures("modules")
def test_prompts_are_the_rows_of_its_dataset() -> None:
    train, held_out = examples({"id": "vf-single"}), examples({"id": "vf-single"}, Split.EVAL)
    assert len(train) == 18 and len(held_out) == 2
    assert not {e.id for e in train} & {e.id for e in held_out}
    first = next(example for example in train if example.id == "3")
    assert [(m.role, m.content) for m in first.prompt] == [("system", "Add."), ("user", "3 + 1?")]
    assert (first.answer, from_struct(first.fields)["info"]) == ("4", {"weight": 0.5})
    assert len(examples({"id": "vf-single", "args": {"count": 40}, "num_examples": 30})) == 30
    assert len(examples({"id": "vf-compared"}, Split.EVAL)) == 2


@needs_verifiers
@pytest.mark.usefixtures("modules")
async def test_a_single_turn_is_scored_by_its_rubric() -> None:
    async with service() as (reward, environment):
        args = {"id": "vf-single"}
        example = next(e for e in examples(args) if e.id == "3")
        request = group("verifiers", "it is 4", "5", args=args)
        request.example.CopyFrom(example)
        turn = await environment.TakeTurn(turn_of(request, "it is 4"))
        assert not turn.messages, "the episode ends after one turn"
        response = await reward.ScoreRollouts(request)
        assert outcomes(response) == [0.5, 0.0]
        assert dict(response.results[0].score.components) == {"exact": 0.5, "length": 7.0, "num_turns": 1.0}


@needs_verifiers
@pytest.mark.usefixtures("modules")
async def test_a_reward_function_that_fails_is_an_error_and_not_0() -> None:
    async with service() as (reward, _):
        args = {"id": "vf-single", "args": {"fails": True}}
        request = group("verifiers", "4", args=args)
        request.example.CopyFrom(examples(args)[0])
        (result,) = (await reward.ScoreRollouts(request)).results
        assert "exact: RuntimeError: no such judge" in result.error.message


@needs_verifiers
@pytest.mark.usefixtures("modules")
async def test_rubrics_that_compare_get_the_whole_group() -> None:
    async with service() as (reward, _):
        request = group("verifiers", "a", "abc", "ab", args={"id": "vf-compared"})
        request.example.CopyFrom(examples({"id": "vf-compared"})[0])
        assert outcomes(await reward.ScoreRollouts(request)) == [0.0, 1.0, 0.0]


@needs_verifiers
@pytest.mark.usefixtures("modules")
async def test_an_episode_of_several_turns() -> None:
    async with service() as (reward, environment):
        request = group("verifiers", "", args={"id": "vf-game"})
        request.example.CopyFrom(examples({"id": "vf-game"})[0])
        rollout = request.rollouts[0]
        said = ["three", "what?", "two", "one"]
        answers = []
        for text in said:
            turn = turn_of(request, text)
            response = await environment.TakeTurn(turn)
            if text == "what?":
                assert await environment.TakeTurn(turn) == response, "a call that was cut off is made again"
            rollout.state.CopyFrom(response.state)
            rollout.messages.add(role="assistant", content=text)
            rollout.messages.extend(response.messages)
            answers += [message.content for message in response.messages]
        assert answers == ["2 to go", "2 to go", "1 to go"], "then it has ended"
        assert outcomes(await reward.ScoreRollouts(request)) == [1.0]
        assert outcomes(await reward.ScoreRollouts(request)) == ["EPISODE_LOST"], "it is kept for one scoring"


@needs_verifiers
@pytest.mark.usefixtures("modules")
async def test_its_own_bound_of_turns_and_a_turn_that_was_cut_off() -> None:
    async with service() as (reward, environment):
        request = group("verifiers", "", args={"id": "vf-game", "args": {"max_turns": 2}})
        request.example.CopyFrom(examples({"id": "vf-game"})[0])
        rollout = request.rollouts[0]
        response = await environment.TakeTurn(turn_of(request, "three"))
        rollout.state.CopyFrom(response.state)
        rollout.messages.add(role="assistant", content="three")
        rollout.messages.extend(response.messages)
        assert not (await environment.TakeTurn(turn_of(request, "two"))).messages, "max_turns of the environment"
        # That last turn was cut off, say, and never shown to it: what the first one earned stands.
        rollout.messages.add(role="assistant", content="tw")
        rollout.finish_reason = common_pb2.FINISH_REASON_LENGTH
        assert outcomes(await reward.ScoreRollouts(request)) == [pytest.approx(1 / 3)]


@needs_verifiers
@pytest.mark.usefixtures("modules")
async def test_an_environment_that_crashes_or_is_restarted_gives_an_error() -> None:
    async with service() as (_, environment):
        request = group("verifiers", "", args={"id": "vf-game"})
        request.example.CopyFrom(examples({"id": "vf-game"})[0])
        with pytest.raises(InternalError, match="board on fire"):
            await environment.TakeTurn(turn_of(request, "crash"))
        rollout = request.rollouts[0]
        rollout.messages.add(role="assistant", content="three")
        rollout.messages.add(role="user", content="2 to go")
        rollout.state.CopyFrom(to_struct({"episode": "of another process"}))
        with pytest.raises(InternalError, match="not known here any more"):
            await environment.TakeTurn(turn_of(request, "two"))


@needs_verifiers
@pytest.mark.usefixtures("modules")
def test_what_cannot_be_loaded_is_refused_by_name() -> None:
    with pytest.raises(InvalidInputError, match=r"env\[\]\.args\.id: not-there cannot be loaded"):
        examples({"id": "not-there"})
    with pytest.raises(InvalidInputError, match="unexpected keyword argument"):
        examples({"id": "vf-single", "args": {"wrong": 1}})


@pytest.fixture
def packages(modules: None, tmp_path: Path) -> None:
    """Two of the modules above as installed packages of their names, and a package that only has the dependency."""
    for name in ("vf_single", "vf-game", "not-here"):
        folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nRequires-Dist: verifiers>=0.2\n")


@pytest.mark.usefixtures("packages")
def test_packages_built_on_verifiers_are_environments_by_their_names() -> None:
    names = [package.name for package in installed_packages()]
    assert {"vf-single", "vf-game"} <= set(names)
    assert not {"not-here", "surogate", "vf-compared"} & set(names)
    registry = built_in(plugins=installed_packages())
    assert registry.get("vf-game").multi_turn
    with pytest.raises(NotFoundError, match=r"no environment 'vf-gane' \(did you mean 'vf-game'\?\)"):
        registry.get("vf-gane")


@pytest.mark.skipif(not MISSING, reason="verifiers is installed")
@pytest.mark.usefixtures("packages")
def test_without_the_package_an_id_that_is_not_there_says_what_to_install() -> None:
    registry = built_in(plugins=installed_packages())
    with pytest.raises(NotFoundError, match=r"pip install 'surogate\[verifiers\]'"):
        registry.get("wordle")
    environment = registry.get("vf-single")
    with pytest.raises(FailedPreconditionError, match=r"pip install 'surogate\[verifiers\]'"):
        environment.examples(environment.parse({}), Split.TRAIN, 0)


@needs_verifiers
@pytest.mark.usefixtures("packages")
async def test_an_environment_by_its_own_id_takes_its_own_arguments() -> None:
    environment = built_in(plugins=installed_packages()).get("vf-single")
    args = {"count": 40, "num_examples": 30}
    given = list(environment.examples(environment.parse(args), Split.TRAIN, 0))
    assert given == examples({"id": "vf-single", "args": {"count": 40}, "num_examples": 30})
    with pytest.raises(InvalidInputError, match=r"env\[\]\.id: vf-single cannot be loaded.*unexpected keyword"):
        list(environment.examples(environment.parse({"wrong": 1}), Split.TRAIN, 0))
    async with (
        reward_server(environment) as address,
        open_channel(address, ClientSecurity()) as channel,
    ):
        request = group("vf-single", f"it is {given[0].answer}", "?", args=args)
        request.example.CopyFrom(given[0])
        assert outcomes(await reward_pb2_grpc.RewardServiceStub(channel).ScoreRollouts(request)) == [0.5, 0.0]


def turn_of(request: reward_pb2.ScoreRolloutsRequest, text: str) -> reward_pb2.TakeTurnRequest:
    """The turn that comes next in the first rollout of a group."""
    rollout = request.rollouts[0]
    turn = reward_pb2.TakeTurnRequest(
        environment=request.environment, args=request.args, example=request.example, rollout_id=rollout.rollout_id
    )
    turn.messages.extend(rollout.messages)
    turn.messages.add(role="assistant", content=text)
    turn.turn = sum(message.role == "assistant" for message in turn.messages)
    turn.state.CopyFrom(rollout.state)
    return turn


def test_what_is_kept_is_bounded_in_time_and_number() -> None:
    now = itertools.count()
    kept: Kept[str] = Kept(seconds=5, most=2, clock=lambda: float(next(now)))
    for key in "abc":
        kept.put(key, key.upper())
    assert (kept.get("a"), kept.get("b"), kept.pop("c")) == (None, "B", "C")
    assert len(kept) == 1
    for _ in range(10):
        next(now)
    assert kept.get("b") is None
