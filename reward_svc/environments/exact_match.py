"""`exact-match`: the user's own prompts and answers from a file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from reward_svc.rewards.normalise import Normalisation, normalise
from surogate.errors import InvalidInputError
from surogate.reward.prompts import DatasetArgs, DatasetEnvironment
from surogate.v1 import reward_pb2


class ExactMatchArgs(DatasetArgs):
    """Arguments of `exact-match`."""

    dataset: str
    """File with prompts and answers, on the reward service's machine: .jsonl, .json or .csv."""
    normalise: tuple[Normalisation, ...] = Field(("strip",), alias="normalize")
    """What is evened out on both sides before they are compared, in this order; see docs/custom-rewards.md."""
    answer_prefix: str | None = Field(None, min_length=1)
    """Compare what follows the last occurrence of this in the completion (`####`); a completion without it is wrong."""
    match: Literal["exact", "contains"] = "exact"
    """exact: they are equal. contains: the answer is somewhere in the completion."""

    model_config = DatasetArgs.model_config | {"populate_by_name": True}


class ExactMatch(DatasetEnvironment[ExactMatchArgs]):
    """Rewards 1 when completion and answer agree after normalisation, else 0."""

    id = "exact-match"
    description = "Answer like the dataset. Reward: 1 when completion and answer agree after normalisation, else 0."
    args_model = ExactMatchArgs
    needs_answer = True

    def score(self, args: ExactMatchArgs, example: reward_pb2.Example, rollout: reward_pb2.Rollout) -> reward_pb2.Score:
        """Compares the completion with `example.answer`."""
        expected = normalise(example.answer, args.normalise)
        if not expected:
            raise InvalidInputError("exact-match needs example.answer, not empty after normalisation")
        given = rollout.completion
        if args.answer_prefix is not None:
            _, found, given = given.rpartition(args.answer_prefix)
            if not found:
                return reward_pb2.Score(reward=0.0, explanation=f"no {args.answer_prefix!r} in the completion")
        given = normalise(given, args.normalise)
        right = expected in given if args.match == "contains" else expected == given
        return reward_pb2.Score(reward=float(right))
