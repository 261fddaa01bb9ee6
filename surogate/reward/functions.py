"""Rewards as plain Python functions: `@reward` scores a rollout, `@group_reward` all rollouts of a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

from surogate.errors import UnimplementedError
from surogate.reward.base import GroupScored, Scored, Split
from surogate.reward.prompts import DatasetArgs, DatasetEnvironment, Row, check_columns, split_examples, to_example
from surogate.reward.splits import rng_for
from surogate.structs import from_struct
from surogate.v1 import reward_pb2

RowSource = Iterable[Row] | Callable[[], Iterable[Row]]
Function = Callable[..., Any]
Decorator = Callable[[Function], "FunctionEnvironment"]
Getters = Mapping[str, Callable[[Any], Any]]
"""How to get what a function's parameter names."""

_OF_EXAMPLE: Getters = {
    "example": lambda example: example,
    "prompt": lambda example: example.prompt[-1].content if example.prompt else "",
    "messages": lambda example: list(example.prompt),
    "answer": lambda example: example.answer,
    "fields": lambda example: from_struct(example.fields),
}
_OF_ROLLOUT: Getters = {
    "rollout": lambda rollout: rollout,
    "completion": lambda rollout: rollout.completion,
    "conversation": lambda rollout: list(rollout.messages),
    "state": lambda rollout: from_struct(rollout.state),
}
_OF_GROUP: Getters = {
    "rollouts": list,
    "completions": lambda rollouts: [rollout.completion for rollout in rollouts],
}


class FunctionEnvironment(DatasetEnvironment[Any]):
    """An environment around a function, which is given the parameters that it names; call it like the function."""

    def __init__(self, function: Function, about: Mapping[str, Any], rows: RowSource | None, known: Getters) -> None:
        vars(self).update(about)
        self.function = function
        self._rows = rows
        wanted = _parameters(function, (*_OF_EXAMPLE, *known, "args"))
        self._of_example = [(name, get) for name, get in _OF_EXAMPLE.items() if name in wanted]
        self._of_scored = [(name, get) for name, get in known.items() if name in wanted]
        self._takes_args = "args" in wanted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.function(*args, **kwargs)

    def examples(self, args: Any, split: Split, seed: int) -> Iterator[reward_pb2.Example]:
        """The rows of `args.dataset`, else those that the decorator was given.

        Raises UnimplementedError for a dataset that is not on this machine: then it is on the orchestrator's.
        """
        if args.dataset is not None and not Path(args.dataset).expanduser().is_file() and self._rows is None:
            raise UnimplementedError(f"environment {self.id} only scores, and {args.dataset} is not on its machine")
        if args.dataset is not None or self._rows is None:
            return super().examples(args, split, seed)
        rows = list(self._rows() if callable(self._rows) else self._rows)
        check_columns(rows, args, needs_answer=False)
        chosen = split_examples(rows, None, args, split)
        rng_for(self.id, split, seed).shuffle(chosen)
        limit = args.num_examples if split is Split.TRAIN else args.eval_examples
        return (to_example(args, number, row) for number, row in chosen[:limit])

    @property
    def is_async(self) -> bool:
        """Whether the function is an `async def`."""
        return inspect.iscoroutinefunction(self.function)

    @property
    def has_examples(self) -> bool:
        """Whether it has prompts without a dataset of the job's."""
        return self._rows is not None

    def _call(self, args: Any, example: reward_pb2.Example, scored: Any) -> Any:
        """Calls the function with what it names of the example and of what is to be scored."""
        values = {name: get(example) for name, get in self._of_example}
        values.update((name, get(scored)) for name, get in self._of_scored)
        if self._takes_args:
            values["args"] = args
        return self.function(**values)


class _RolloutFunction(FunctionEnvironment):
    def score(self, args: Any, example: reward_pb2.Example, rollout: reward_pb2.Rollout) -> Scored | Awaitable[Scored]:
        return cast("Scored", self._call(args, example, rollout))


class _GroupFunction(FunctionEnvironment):
    def score_group(
        self, args: Any, example: reward_pb2.Example, rollouts: Sequence[reward_pb2.Rollout]
    ) -> GroupScored | Awaitable[GroupScored]:
        return cast("GroupScored", self._call(args, example, rollouts))


class About(TypedDict, total=False):
    """What `reward` and `group_reward` are told of an environment."""

    description: str | None
    """What it rewards; unset: the first line of the function's docstring."""
    version: str
    """Changes when the same rollout would earn another reward than before."""
    args: type[DatasetArgs]
    """Schema of `env[].args`."""
    examples: RowSource | None
    """Rows with `prompt` and, perhaps, `answer`, or a function that returns them; unset: `env[].args.dataset`."""
    deterministic: bool
    """Whether the same rollout always earns the same reward; true unless given."""
    min_reward: float | None
    """Smallest reward; None if unbounded, as it is unless given."""
    max_reward: float | None
    """Largest reward; None if unbounded, as it is unless given."""


def reward(id: str, **about: Unpack[About]) -> Decorator:  # noqa: A002 - as in env[].id
    """Makes an environment of a function that scores one completion; it may be `async`.

    The function is given what its parameters name: `completion`, `answer`, `prompt` (text of the last message),
    `messages`, `fields` (the example's other columns), `args` (validated `env[].args`, an `args` model), `example`,
    `rollout`; of an episode also `conversation` (what was said after the prompt) and `state`. It returns a number or a
    `Score`, and raises an exception for what it cannot score.
    """
    return _decorator(_RolloutFunction, _OF_ROLLOUT, id, about)


def group_reward(id: str, **about: Unpack[About]) -> Decorator:  # noqa: A002 - as in env[].id
    """Like `reward`, of a function that scores all completions of a prompt at once.

    Its parameters may name `completions` and `rollouts` in place of the singular. It returns a sequence with a number,
    a `Score` or a `SurogateError` for each, in order.
    """
    return _decorator(_GroupFunction, _OF_GROUP, id, about)


def _decorator(cls: type[FunctionEnvironment], known: Getters, name: str, given: About) -> Decorator:
    if unknown := given.keys() - About.__annotations__.keys():
        raise TypeError(f"a reward has no {', '.join(sorted(unknown))}; it has {', '.join(About.__annotations__)}")

    def decorate(function: Function) -> FunctionEnvironment:
        about = {
            "id": name,
            "description": given.get("description") or (inspect.getdoc(function) or function.__name__).splitlines()[0],
            "args_model": given.get("args", DatasetArgs),
            "version": given.get("version", "1"),
            "deterministic": given.get("deterministic", True),
            "min_reward": given.get("min_reward"),
            "max_reward": given.get("max_reward"),
        }
        environment = cls(function, about, given.get("examples"), known)
        environment.__doc__ = function.__doc__
        return environment

    return decorate


def _parameters(function: Function, known: Sequence[str]) -> frozenset[str]:
    """The names that a function wants. Raises TypeError for one that is not known and has no default."""
    wanted = set()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in known and parameter.kind is not parameter.POSITIONAL_ONLY:
            wanted.add(name)
        elif parameter.default is parameter.empty:
            raise TypeError(
                f"{function.__qualname__}: a reward cannot be given {name!r}; it may name {', '.join(known)}"
            )
    return frozenset(wanted)
