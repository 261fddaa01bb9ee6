"""Environments that are built on the `verifiers` package, where they are installed: by their own id, or `verifiers`.

The package keeps an episode in an object that cannot travel. It stays here, under a key that travels in the episode's
state, for a bounded time: a service that was restarted in between answers with an error, and the rollout is left out.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from typing import Any

from pydantic import Field

from reward_svc.adapters.kept import Kept
from reward_svc.adapters.rubrics import scored
from reward_svc.adapters.verifiers_episodes import begin, end, load, refused, respond
from surogate.errors import InternalError, SurogateError
from surogate.reward.base import Environment, EnvironmentArgs, Split
from surogate.reward.episode import Episode
from surogate.reward.splits import rng_for, split_rows
from surogate.structs import from_struct, to_struct
from surogate.v1 import common_pb2, reward_pb2

_KEY = "episode"


class VerifiersArgs(EnvironmentArgs):
    """Arguments of `verifiers`."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=200)
    """Environment: the name of its package, as `vf.load_environment` takes it."""
    args: dict[str, Any] = Field({})
    """Its own arguments."""


class _LostError(InternalError):
    """An episode whose object is not here."""

    reason = "EPISODE_LOST"


_LOST = "the episode is not known here any more: the reward service was restarted, or it took too long"


@dataclass
class _Running:
    """An episode that is going on, and the answer to its last turn."""

    state: Any
    turn: int = 0
    answer: list[common_pb2.ChatMessage] | None = None


class Verifiers(Environment[VerifiersArgs]):
    """Rewards by the environment's rubric."""

    id = "verifiers"
    description = "An installed environment of the `verifiers` package, named by args.id. Reward: its rubric's."
    args_model = VerifiersArgs
    min_reward = None
    max_reward = None
    deterministic = False

    def __init__(self, key: str = "args.id") -> None:
        """`key`: where in `env[]` the environment is named."""
        self._key = key
        self._lock = threading.Lock()
        self._loaded: dict[str, Any] = {}
        self._episodes: Kept[_Running] = Kept()

    def examples(self, args: VerifiersArgs, split: Split, seed: int) -> Iterator[reward_pb2.Example]:
        """The rows of its dataset; held out are its evaluation dataset's or, without one, a tenth of the rows."""
        environment = self._environment(args)
        rows = self._rows(environment, args, split)
        rng_for(f"{self.id}/{args.id}", split, seed).shuffle(rows)
        limit = args.num_examples if split is Split.TRAIN else args.eval_examples
        return (self._example(args, row) for row in rows[:limit])

    async def turn(
        self, args: VerifiersArgs, example: reward_pb2.Example, episode: Episode
    ) -> list[common_pb2.ChatMessage] | None:
        """What the environment says; None when one of its conditions to stop holds."""
        environment = self._environment(args)
        if episode.turn == 1:
            episode.state[_KEY] = uuid.uuid4().hex
            self._episodes.put(episode.state[_KEY], _Running(await begin(environment, example)))
        running = self._episodes.get(str(episode.state.get(_KEY, "")))
        if running is None:
            raise _LostError(_LOST)
        if running.turn < episode.turn:  # else the call was cut off, and is made again
            running.turn = episode.turn
            running.answer = await respond(environment, running.state, episode.completion)
        return running.answer

    async def score_group(
        self, args: VerifiersArgs, example: reward_pb2.Example, rollouts: Sequence[reward_pb2.Rollout]
    ) -> list[reward_pb2.Score | SurogateError]:
        """By the environment's rubric. A reward function that fails is an error, where the package would give 0."""
        environment = self._environment(args)
        states = [await self._ended(environment, example, rollout) for rollout in rollouts]
        found = iter(await scored(environment, [state for state in states if not isinstance(state, SurogateError)]))
        return [state if isinstance(state, SurogateError) else next(found) for state in states]

    async def _ended(self, environment: Any, example: reward_pb2.Example, rollout: reward_pb2.Rollout) -> Any:
        """The episode's object with all that was said, or why there is none."""
        said = [message.content for message in rollout.messages if message.role == "assistant"] or [rollout.completion]
        running = self._episodes.pop(str(from_struct(rollout.state).get(_KEY, "")))
        if running is None and len(said) > 1:
            return _LostError(_LOST)
        # A single turn says it all, also when stored rollouts are scored again.
        state = running.state if running else await begin(environment, example)
        truncated = rollout.finish_reason == common_pb2.FINISH_REASON_LENGTH
        await end(environment, state, said[-1] if len(state["trajectory"]) < len(said) else None, truncated=truncated)
        return state

    def _rows(self, environment: Any, args: VerifiersArgs, split: Split) -> list[dict[str, Any]]:
        held_out, train = environment.build_eval_dataset(), environment.build_dataset()
        if held_out is not None:
            chosen = held_out if split is Split.EVAL else train
            return [dict(row) for row in chosen or ()]
        if train is None:
            raise refused(self._key, f"{args.id} has no dataset")
        return split_rows([dict(row) for row in train], lambda row: str(row["prompt"]), split, args.eval_examples)

    def _environment(self, args: VerifiersArgs) -> Any:
        key = args.model_dump_json(include={"id", "args"})
        with self._lock:
            if key not in self._loaded:
                self._loaded[key] = load(args.id, args.args, self._key)
        return self._loaded[key]

    def _example(self, args: VerifiersArgs, row: Mapping[str, Any]) -> reward_pb2.Example:
        """A row of the dataset; its columns other than prompt and answer become `fields`."""
        prompt = row["prompt"]
        if not isinstance(prompt, list) or not all(isinstance(item.get("content"), str) for item in prompt):
            raise refused(self._key, f"{args.id} has prompts that are not messages of text")
        messages = [common_pb2.ChatMessage(role=item["role"], content=item["content"]) for item in prompt]
        fields = {name: value for name, value in row.items() if name not in ("prompt", "answer")}
        plain = json.loads(json.dumps(fields, default=str))  # dates and the like have no form of their own in JSON
        answer = row.get("answer")
        return reward_pb2.Example(
            id=str(row["example_id"]),
            prompt=messages,
            answer="" if answer is None else str(answer),
            fields=to_struct(plain),
        )


class InstalledArgs(EnvironmentArgs):
    """Arguments of an environment by its own id: those of its `load_environment`, beside how many prompts to take."""

    model_config = EnvironmentArgs.model_config | {"extra": "allow"}


class Installed(Environment[InstalledArgs]):
    """An environment of an installed package, by the name of the package: `verifiers` with `args.id` set to it."""

    args_model = InstalledArgs
    min_reward = None
    max_reward = None
    deterministic = False

    def __init__(self, name: str) -> None:
        self.id = name
        self.description = f"The environment {name} of the `verifiers` package. Reward: its rubric's."
        self._verifiers = Verifiers("id")

    def examples(self, args: InstalledArgs, split: Split, seed: int) -> Iterator[reward_pb2.Example]:
        """As `Verifiers`."""
        return self._verifiers.examples(self._named(args), split, seed)

    async def turn(
        self, args: InstalledArgs, example: reward_pb2.Example, episode: Episode
    ) -> list[common_pb2.ChatMessage] | None:
        """As `Verifiers`."""
        return await self._verifiers.turn(self._named(args), example, episode)

    async def score_group(
        self, args: InstalledArgs, example: reward_pb2.Example, rollouts: Sequence[reward_pb2.Rollout]
    ) -> list[reward_pb2.Score | SurogateError]:
        """As `Verifiers`."""
        return await self._verifiers.score_group(self._named(args), example, rollouts)

    def _named(self, args: InstalledArgs) -> VerifiersArgs:
        ours = args.model_dump(include={"num_examples", "eval_examples"}, exclude_unset=True)
        its_own = dict(args.model_extra or {})
        if args.system_prompt is not None:  # many environments have an argument of this name
            its_own["system_prompt"] = args.system_prompt
        return VerifiersArgs(id=self.id, args=its_own, **ours)


@dataclass(frozen=True)
class Package:
    """An installed package whose module has an environment, as `Registry` takes those that packages bring."""

    name: str

    @property
    def value(self) -> str:
        """What it comes from, for people."""
        return f"package {self.name}"

    def load(self) -> Installed:
        """The environment; its module is imported when it is used."""
        return Installed(self.name)


def installed_packages() -> list[Package]:
    """Packages that are built on `verifiers`: they depend on it, and have a module of their name. None is imported."""
    return [Package(name) for name in sorted(set(filter(None, map(_package, distributions()))))]


def _package(distribution: Distribution) -> str | None:
    name = re.sub(r"[-_.]+", "-", distribution.name or "").lower()
    needs = [re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0].lower() for line in distribution.requires or ()]
    if "verifiers" not in needs or name == "surogate":  # its extra names the package too
        return None
    return name if find_spec(name.replace("-", "_")) else None
