"""Scoring by rubrics of the `verifiers` package, where a reward function that fails gives 0: here that is an error."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Any

from surogate.errors import InternalError, SurogateError
from surogate.v1 import reward_pb2

Function = Callable[..., Any]

_failures: ContextVar[list[str]] = ContextVar("failures")
"""What went wrong with the rollout, or the group, that is being scored."""


def watch(rubric: Any) -> None:
    """Has the reward functions of a rubric, and of those within it, tell when they fail."""
    for part in getattr(rubric, "rubrics", ()):
        watch(part)
    rubric.funcs = [_watched(function) for function in rubric.funcs]


async def scored(environment: Any, states: Sequence[Any]) -> list[reward_pb2.Score | SurogateError]:
    """The outcome for each episode; they are scored at once only where the rubric compares them."""
    rubric = environment.rubric
    if not rubric.has_group_rewards:
        return [await _outcome(rubric.score_rollout(state), state) for state in states]
    failures: list[str] = []
    _failures.set(failures)
    await rubric.score_group(list(states))
    return [_read(state, failures) for state in states]


async def _outcome(scoring: Awaitable[None], state: Any) -> reward_pb2.Score | SurogateError:
    failures: list[str] = []
    _failures.set(failures)
    await scoring
    return _read(state, failures)


def _read(state: Any, failures: Sequence[str]) -> reward_pb2.Score | SurogateError:
    if failures:
        return InternalError(f"scoring failed: {failures[0]}")
    components = {name: float(value) for name, value in (state["metrics"] or {}).items()}
    return reward_pb2.Score(reward=float(state["reward"]), components=components)


def _watched(function: Function) -> Function:
    @functools.wraps(function)  # the rubric reads names and parameters
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            found = function(*args, **kwargs)
        except Exception as error:
            _note(function, error)
            raise
        return _awaited(function, found) if inspect.isawaitable(found) else found

    return call


async def _awaited(function: Function, found: Awaitable[Any]) -> Any:
    try:
        return await found
    except Exception as error:
        _note(function, error)
        raise


def _note(function: Function, error: Exception) -> None:
    name = getattr(function, "__name__", "a reward function")
    _failures.get([]).append(f"{name}: {type(error).__name__}: {error}")
