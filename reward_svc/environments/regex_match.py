"""`regex`: completions that match a pattern."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from reward_svc.rewards.patterns import compiled, find
from surogate.errors import InvalidInputError
from surogate.reward.prompts import DatasetArgs, DatasetEnvironment, checked, own_or_given
from surogate.v1 import reward_pb2


class RegexArgs(DatasetArgs):
    """Arguments of `regex`."""

    pattern: Annotated[str | None, checked(compiled)] = Field(None, min_length=1, max_length=10_000)
    """Regular expression, in the syntax of the `regex` package. Unset: each example's own, from `pattern_field`."""
    pattern_field: str = "pattern"
    """Column with the example's own pattern, which comes before `pattern`."""
    match: Literal["search", "fullmatch"] = "search"
    """search: somewhere in the completion. fullmatch: all of it, white space at its ends removed."""
    flags: tuple[Literal["ignore_case", "multiline", "dot_all"], ...] = ()
    """ignore_case, multiline (^ and $ at lines), dot_all (. also matches line ends)."""
    group: int | str | None = None
    """Group (number or name) of the last match that must equal `answer`, white space at its ends removed. Unset: a
    match is enough."""
    timeout: float = Field(1.0, gt=0, le=60)
    """Seconds that matching may take. What takes longer is an error of that rollout, not a reward."""


class RegexMatch(DatasetEnvironment[RegexArgs]):
    """Rewards 1 for a match, else 0."""

    id = "regex"
    description = "Match a regular expression. Reward: 1 for a match (whose group equals the answer, if set), else 0."
    args_model = RegexArgs

    def score(self, args: RegexArgs, example: reward_pb2.Example, rollout: reward_pb2.Rollout) -> reward_pb2.Score:
        """Matches. Raises InvalidInputError without a usable pattern, DeadlineError if it takes too long."""
        pattern = own_or_given(example, args.pattern_field, args.pattern)
        if not pattern or not isinstance(pattern, str):
            raise InvalidInputError(f"regex needs args.pattern, or a text in the column {args.pattern_field!r}")
        text = rollout.completion.strip() if args.match == "fullmatch" else rollout.completion
        try:
            match = find(pattern, text, how=args.match, flags=args.flags, timeout=args.timeout)
            given = None if match is None or args.group is None else match[args.group]
        except (ValueError, IndexError) as error:
            raise InvalidInputError(f"regex cannot use the pattern {pattern[:100]!r}: {error}") from error
        if match is None:
            return reward_pb2.Score(reward=0.0, explanation="no match", components={"matched": 0.0})
        right = args.group is None or (given or "").strip() == example.answer.strip()
        return reward_pb2.Score(reward=float(right), components={"matched": 1.0})
