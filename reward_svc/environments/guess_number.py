"""`guess-number`: an episode of several turns, in which each guess is answered by "higher" or "lower"."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from pydantic import Field, model_validator

from reward_svc.rewards.number import last_number
from surogate.errors import InvalidInputError
from surogate.reward.base import Environment, EnvironmentArgs, Split
from surogate.reward.episode import Episode
from surogate.reward.splits import draw_unique, rng_for, text_hash
from surogate.structs import from_struct
from surogate.v1 import reward_pb2

RULES = (
    "I am thinking of a whole number from {low} to {high}. Guess it: say one number at a time. I will tell you whether "
    "mine is higher or lower."
)
NO_NUMBER = "That is no number. Say a whole number."
_FAR = 1e15


class GuessNumberArgs(EnvironmentArgs):
    """Arguments of `guess-number`."""

    min_value: int = Field(0, ge=-(10**12), le=10**12)
    """Smallest number that may be asked for."""
    max_value: int = Field(10_000, ge=-(10**12), le=10**12)
    """Largest number that may be asked for."""
    span: int = Field(100, ge=2, le=10**12)
    """Numbers to choose from in an episode: a range within `min_value` and `max_value`."""

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.max_value - self.min_value < self.span:
            raise ValueError(f"span {self.span} is too large for {self.min_value} to {self.max_value}")
        return self


@dataclass(frozen=True)
class _Riddle:
    low: int
    high: int
    number: int

    @property
    def text(self) -> str:
        return RULES.format(low=self.low, high=self.high)


class GuessNumber(Environment[GuessNumberArgs]):
    """Rewards 1 for the number, and up to a half for the closest guess of an episode that does not find it."""

    id = "guess-number"
    description = 'Guess a number by "higher" and "lower". Reward: 1 when found, else up to 0.5 for the closest guess.'
    args_model = GuessNumberArgs

    def examples(self, args: GuessNumberArgs, split: Split, seed: int) -> Iterator[reward_pb2.Example]:
        """Yields ranges; `answer` is the number."""
        rng = rng_for(self.id, split, seed)

        def draw() -> _Riddle:
            return _draw(args, rng)

        for riddle in draw_unique(draw, lambda item: item.text, split, args.generated(split)):
            example = reward_pb2.Example(
                id=f"{text_hash(riddle.text):016x}", prompt=args.messages(riddle.text), answer=str(riddle.number)
            )
            example.fields.update({"low": riddle.low, "high": riddle.high})
            yield example

    def turn(self, args: GuessNumberArgs, example: reward_pb2.Example, episode: Episode) -> str | None:
        """Says where the number is; ends when it is found. Remembers the closest guess."""
        guess, number = last_number(episode.completion), _number(example)
        if guess is None:
            return NO_NUMBER
        distance = min(float(abs(guess - number)), _FAR)
        episode.state["closest"] = min(distance, episode.state.get("closest", _FAR))
        if not distance:
            return None
        return "Higher." if guess < number else "Lower."

    def score(
        self, args: GuessNumberArgs, example: reward_pb2.Example, rollout: reward_pb2.Rollout
    ) -> reward_pb2.Score:
        """By the closest guess. A range's width away, or no number at all, is worth nothing."""
        closest = from_struct(rollout.state).get("closest")
        found = closest == 0
        near = 0.0 if closest is None else max(0.0, 1 - closest / args.span)
        explanation = "no number was said" if closest is None else f"the closest guess was {closest:g} away"
        return reward_pb2.Score(
            reward=1.0 if found else near / 2, components={"found": float(found)}, explanation=explanation
        )


def _draw(args: GuessNumberArgs, rng: random.Random) -> _Riddle:
    low = rng.randint(args.min_value, args.max_value - args.span + 1)
    high = low + args.span - 1
    return _Riddle(low, high, rng.randint(low, high))


def _number(example: reward_pb2.Example) -> int:
    try:
        return int(example.answer)
    except ValueError as error:
        raise InvalidInputError(
            f"guess-number needs a whole number in example.answer, not {example.answer!r}"
        ) from error
