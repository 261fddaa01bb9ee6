"""Rewards as plain Python functions: `@reward` scores a rollout, `@group_reward` all rollouts of a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from surogate.errors import UnimplementedError
from surogate.reward.base import GroupScored, Scored, Split
from surogate.reward.prompts import DatasetArgs, DatasetEnvironment, Row, check_columns, split_examples, to_example
from surogate.reward.splits import rng_for
from surogate.structs import from_struct
from surogate.v1 import reward_pb2

RowSource = Iterable[Row] | Callable[[], Iterable[Row]]
Function = Callable[..., Any]
Decorator = Callable[[Function], "FunctionEnvironment"]

_OF_EXAMPLE: Mapping[str, Callable[[reward_pb2.Example], Any]] = {
    "example": lambda example: example,
    "prompt": lambda example: example.prompt[-1].content if example.prompt else "",
    "messages": lambda example: list(example.prompt),
    "answer": lambda example: example.answer,
    "fields": lambda example: from_struct(example.fields),
}
_OF_ROLLOUT: Mapping[str, Callable[[reward_pb2.Rollout], Any]] = {
    "rollout": lambda rollout: rollout,
    "completion": lambda rollout: rollout.completion,
    "conversation": lambda rollout: list(rollout.messages),
    "state": lambda rollout: from_struct(rollout.state),
}
_OF_GROUP: Mapping[str, Callable[[Sequence[reward_pb2.Rollout]], Any]] = {
    "rollouts": list,
    "completions": lambda rollouts: [rollout.completion for rollout in rollouts],
}


class FunctionEnvironment(DatasetEnvironment[Any]):
    """An environment around a function, which is given the parameters that it names; call it like the function."""

    def __init__(
        self, function: Function, about: Mapping[str, Any], rows: RowSource | None, known: Sequence[str]
    ) -> None:
        vars(self).update(about)
        self.function = function
        self._rows = rows
        self._wanted = _parameters(function, (*_OF_EXAMPLE, *known, "args"))

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

    def _given(self, args: Any, example: reward_pb2.Example) -> dict[str, Any]:
        values = {name: get(example) for name, get in _OF_EXAMPLE.items() if name in self._wanted}
        return values | ({"args": args} if "args" in self._wanted else {})


class _RolloutFunction(FunctionEnvironment):
    def score(self, args: Any, example: reward_pb2.Example, rollout: reward_pb2.Rollout) -> Scored | Awaitable[Scored]:
        values = {name: get(rollout) for name, get in _OF_ROLLOUT.items() if name in self._wanted}
        return cast("Scored", self.function(**self._given(args, example), **values))


class _GroupFunction(FunctionEnvironment):
    def score_group(
        self, args: Any, example: reward_pb2.Example, rollouts: Sequence[reward_pb2.Rollout]
    ) -> GroupScored | Awaitable[GroupScored]:
        values = {name: get(rollouts) for name, get in _OF_GROUP.items() if name in self._wanted}
        return cast("GroupScored", self.function(**self._given(args, example), **values))


def reward(
    id: str,  # noqa: A002 - as in env[].id
    *,
    description: str | None = None,
    version: str = "1",
    args: type[DatasetArgs] = DatasetArgs,
    examples: RowSource | None = None,
    deterministic: bool = True,
    min_reward: float | None = None,
    max_reward: float | None = None,
) -> Decorator:
    """Makes an environment of a function that scores one completion; it may be `async`.

    The function is given what its parameters name: `completion`, `answer`, `prompt` (text of the last message),
    `messages`, `fields` (the example's other columns), `args` (validated `env[].args`, an `args` model), `example`,
    `rollout`; of an episode also `conversation` (what was said after the prompt) and `state`. It returns a number or a
    `Score`, and raises an exception for what it cannot score.

    `examples` are rows with `prompt` and, perhaps, `answer`, or a function that returns them; without, the prompts come
    from `env[].args.dataset`. `description` defaults to the first line of the function's docstring.
    """
    return _decorator(_RolloutFunction, tuple(_OF_ROLLOUT), locals())


def group_reward(
    id: str,  # noqa: A002 - as in env[].id
    *,
    description: str | None = None,
    version: str = "1",
    args: type[DatasetArgs] = DatasetArgs,
    examples: RowSource | None = None,
    deterministic: bool = True,
    min_reward: float | None = None,
    max_reward: float | None = None,
) -> Decorator:
    """Like `reward`, of a function that scores all completions of a prompt at once.

    Its parameters may name `completions` and `rollouts` in place of the singular. It returns a sequence with a number,
    a `Score` or a `SurogateError` for each, in order.
    """
    return _decorator(_GroupFunction, tuple(_OF_GROUP), locals())


def _decorator(cls: type[FunctionEnvironment], known: Sequence[str], given: Mapping[str, Any]) -> Decorator:
    def decorate(function: Function) -> FunctionEnvironment:
        about = {
            "id": given["id"],
            "description": given["description"] or (inspect.getdoc(function) or function.__name__).splitlines()[0],
            "args_model": given["args"],
            **{name: given[name] for name in ("version", "deterministic", "min_reward", "max_reward")},
        }
        environment = cls(function, about, given["examples"], known)
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
