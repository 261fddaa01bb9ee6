"""`arithmetic`: generated sums, verified by value."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from reward_svc.rewards.number import last_number
from surogate.errors import InvalidInputError
from surogate.reward.base import Environment, EnvironmentArgs, Split
from surogate.reward.splits import draw_unique, rng_for, text_hash
from surogate.v1 import reward_pb2

Operation = Literal["+", "-", "*", "/"]


class ArithmeticArgs(EnvironmentArgs):
    """Arguments of `arithmetic`."""

    min_value: int = Field(0, ge=-(10**12), le=10**12)
    """Smallest operand."""
    max_value: int = Field(20, ge=-(10**12), le=10**12)
    """Largest operand (of a division: largest divisor and quotient)."""
    operations: tuple[Operation, ...] = Field(("+", "-"), min_length=1)
    """Operations to draw from. Divisions always come out whole."""
    template: str = "{a} {op} {b} ="
    """Prompt, with `{a}`, `{op}` and `{b}` in it."""

    @field_validator("template")
    @classmethod
    def _has_fields(cls, value: str) -> str:
        missing = [field for field in ("{a}", "{op}", "{b}") if field not in value]
        if missing:
            raise ValueError(f"must contain {', '.join(missing)}")
        return value

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.min_value > self.max_value:
            raise ValueError(f"min_value {self.min_value} is above max_value {self.max_value}")
        if "/" in self.operations and self.min_value == self.max_value == 0:
            raise ValueError("division needs operands other than 0")
        return self


@dataclass(frozen=True)
class _Problem:
    a: int
    op: str
    b: int
    value: int

    @property
    def text(self) -> str:
        return f"{self.a}{self.op}{self.b}"


class Arithmetic(Environment[ArithmeticArgs]):
    """Rewards 1 when the last number in the completion equals the result, else 0."""

    id = "arithmetic"
    description = "Compute a op b. Reward: 1 when the last number in the completion is the result, else 0."
    args_model = ArithmeticArgs

    def examples(self, args: ArithmeticArgs, split: Split, seed: int) -> Iterator[reward_pb2.Example]:
        """Yields problems; `answer` is the result in plain notation."""
        draw = _drawer(args, rng_for(self.id, split, seed))
        for problem in draw_unique(draw, lambda item: item.text, split, args.generated(split)):
            prompt = _render(args.template, problem)
            example = reward_pb2.Example(
                id=f"{text_hash(problem.text):016x}", prompt=args.messages(prompt), answer=str(problem.value)
            )
            example.fields.update({"a": problem.a, "op": problem.op, "b": problem.b})
            yield example

    def score(self, args: ArithmeticArgs, example: reward_pb2.Example, rollout: reward_pb2.Rollout) -> reward_pb2.Score:
        """Compares by value: `7`, `7.0` and `the answer is 7` are the same. No number at all is a wrong answer."""
        try:
            expected = Decimal(example.answer)
        except InvalidOperation as error:
            raise InvalidInputError(f"arithmetic needs a number in example.answer, not {example.answer!r}") from error
        given = last_number(rollout.completion)
        explanation = "no number in the completion" if given is None else f"read {given}, expected {expected}"
        return reward_pb2.Score(
            reward=float(given == expected), components={"parsed": float(given is not None)}, explanation=explanation
        )


def _drawer(args: ArithmeticArgs, rng: random.Random) -> Callable[[], _Problem]:
    def draw() -> _Problem:
        op = rng.choice(args.operations)
        a = rng.randint(args.min_value, args.max_value)
        b = rng.randint(args.min_value, args.max_value)
        if op == "/":
            while b == 0:
                b = rng.randint(args.min_value, args.max_value)
            return _Problem(a * b, op, b, a)
        return _Problem(a, op, b, {"+": a + b, "-": a - b, "*": a * b}[op])

    return draw


def _render(template: str, problem: _Problem) -> str:
    # Not str.format: a template may hold other braces.
    return template.replace("{a}", str(problem.a)).replace("{op}", problem.op).replace("{b}", str(problem.b))
