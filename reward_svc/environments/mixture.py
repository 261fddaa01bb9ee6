"""`mixture`: a weighted sum of other environments' rewards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from surogate.errors import InvalidInputError, SurogateError, Violation
from surogate.reward.arguments import PREFIX, bad_argument
from surogate.reward.base import Split
from surogate.reward.composite import Composite, Part
from surogate.reward.outcome import Outcome
from surogate.reward.prompts import DatasetArgs
from surogate.reward.registry import Registry
from surogate.v1 import reward_pb2

MAX_PARTS = 32


class PartArgs(BaseModel):
    """One part of a mixture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    """Environment."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """Factor of its reward; may be negative."""
    name: str | None = Field(None, min_length=1)
    """Name of its component; unset: its id."""
    args: dict[str, Any] = Field({})
    """Its arguments."""

    @property
    def label(self) -> str:
        """Name in components."""
        return self.name or self.id


class MixtureArgs(DatasetArgs):
    """Arguments of `mixture`."""

    parts: Annotated[tuple[PartArgs, ...], Field(min_length=1, max_length=MAX_PARTS)]
    """The environments; the prompts are `dataset`'s, else those of the first part that has some."""
    normalize: bool = True
    """Divide by the sum of the weights' sizes: parts from 0 to 1 with weights above 0 give a reward from 0 to 1."""


class Mixture(Composite[MixtureArgs]):
    """Σ weight·reward over the parts. A part that cannot score a rollout is an error of that rollout."""

    id = "mixture"
    description = "Weighted sum of other environments' rewards, with the rewards of the parts as components."
    args_model = MixtureArgs
    min_reward = None
    max_reward = None
    deterministic = False  # as its parts are, which arguments decide

    def __init__(self) -> None:
        self.registry: Registry | None = None

    def parts(self, args: MixtureArgs) -> Sequence[Part]:
        """The parts with their arguments."""
        return [self._part(number, part) for number, part in enumerate(args.parts)]

    def examples(self, args: MixtureArgs, split: Split, seed: int) -> Iterator[reward_pb2.Example]:
        """The dataset's rows, else the prompts of the first part that has some."""
        if args.dataset is not None:
            return super().examples(args, split, seed)
        for part in self.parts(args):
            if part.environment.has_examples and getattr(part.args, "dataset", "") is not None:
                return part.environment.examples(part.args, split, seed)
        raise bad_argument("dataset", "is needed: no part of the mixture has prompts")

    def combine(self, args: MixtureArgs, outcomes: Sequence[Outcome]) -> Outcome:
        """Adds up; the first error of a part is the rollout's."""
        total, components, explanations = 0.0, {}, []
        for part, outcome in zip(args.parts, outcomes, strict=True):
            if isinstance(outcome, SurogateError):
                return outcome
            total += part.weight * outcome.reward
            components[part.label] = outcome.reward
            components |= {f"{part.label}.{name}": value for name, value in outcome.components.items()}
            explanations += [f"{part.label}: {outcome.explanation}"] if outcome.explanation else []
        scale = sum(abs(part.weight) for part in args.parts) if args.normalize else 1.0
        return reward_pb2.Score(
            reward=total / scale if scale else 0.0, components=components, explanation="; ".join(explanations)
        )

    def _part(self, number: int, part: PartArgs) -> Part:
        assert self.registry is not None
        if part.id == self.id:
            raise bad_argument(f"parts.{number}.id", "a mixture cannot be part of a mixture")
        try:
            environment = self.registry.get(part.id)
            if environment.multi_turn:
                raise bad_argument(
                    f"parts.{number}.id", f"{part.id} answers turns, and a mixture's rollouts are single ones"
                )
            return Part(environment, environment.parse(part.args))
        except InvalidInputError as error:
            where = f"{PREFIX}.parts.{number}.args"
            violations = [
                Violation(where + item.field.removeprefix(PREFIX), item.description) for item in error.violations
            ]
            raise InvalidInputError("\n".join(map(str, violations)), violations=violations) from error
        except SurogateError as error:
            raise bad_argument(f"parts.{number}.id", error.message) from error
