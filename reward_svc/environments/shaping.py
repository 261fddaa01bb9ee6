"""`format` and `length`: rewards for the shape of a completion, mostly as parts of a mixture."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from surogate.reward.prompts import DatasetArgs, DatasetEnvironment
from surogate.v1 import common_pb2, reward_pb2


class FormatArgs(DatasetArgs):
    """Arguments of `format`. Each thing asked for is one check."""

    tags: tuple[str, ...] = ()
    """Each of these must stand once as `<tag>…</tag>`, in this order, not one within another."""
    nothing_outside: bool = False
    """Nothing but white space may stand outside of the tags."""
    starts_with: str | None = Field(None, min_length=1)
    """What the completion begins with."""
    ends_with: str | None = Field(None, min_length=1)
    """What the completion ends with."""
    contains: tuple[str, ...] = ()
    """What must be somewhere in it."""
    forbids: tuple[str, ...] = ()
    """What must not be in it."""
    partial: bool = True
    """Reward the share of checks that hold; otherwise 1 if all hold, else 0."""

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not (self.tags or self.contains or self.forbids or self.starts_with or self.ends_with):
            raise ValueError("asks for nothing: set tags, starts_with, ends_with, contains or forbids")
        if self.nothing_outside and not self.tags:
            raise ValueError("nothing_outside needs tags")
        return self


class Format(DatasetEnvironment[FormatArgs]):
    """Rewards the share of checks that hold."""

    id = "format"
    description = "Keep to a format: tags, beginning, end, required and forbidden texts. Reward: share of checks kept."
    args_model = FormatArgs

    def score(self, args: FormatArgs, example: reward_pb2.Example, rollout: reward_pb2.Rollout) -> reward_pb2.Score:
        """Makes all checks."""
        checks = _format_checks(args, rollout.completion)
        share = sum(checks.values()) / len(checks)
        broken = ", ".join(name for name, kept in checks.items() if not kept)
        return reward_pb2.Score(
            reward=share if args.partial else float(share == 1.0),
            components={name: float(kept) for name, kept in checks.items()},
            explanation=f"broken: {broken}" if broken else "",
        )


def _format_checks(args: FormatArgs, text: str) -> dict[str, bool]:
    checks: dict[str, bool] = {}
    position = 0
    outside = ""
    for tag in args.tags:
        begin, end = f"<{tag}>", f"</{tag}>"
        start = text.find(begin, position)
        stop = text.find(end, start + len(begin)) if start >= 0 else -1
        whole = stop >= 0 and text.count(begin) == 1 and text.count(end) == 1
        inside = text[start + len(begin) : stop]
        kept = whole and not any(f"<{other}>" in inside for other in args.tags)
        checks[f"tag:{tag}"] = kept
        if kept:
            outside += text[position:start]
            position = stop + len(end)
    if args.nothing_outside:
        checks["nothing_outside"] = not (outside + text[position:]).strip()
    if args.starts_with is not None:
        checks["starts_with"] = text.startswith(args.starts_with)
    if args.ends_with is not None:
        checks["ends_with"] = text.rstrip().endswith(args.ends_with)
    checks |= {f"contains:{part}": part in text for part in args.contains}
    checks |= {f"forbids:{part}": part not in text for part in args.forbids}
    return checks


class LengthArgs(DatasetArgs):
    """Arguments of `length`."""

    unit: Literal["tokens", "characters", "words"] = "tokens"
    """What is counted."""
    least: int = Field(0, ge=0, alias="min")
    """Shortest completion with the full reward."""
    most: int | None = Field(None, ge=0, alias="max")
    """Longest completion with the full reward; unset: any."""
    slope: int = Field(100, ge=1)
    """Units outside of the range over which the reward falls to 0, in a straight line."""
    truncated: Literal["count", "zero"] = "count"
    """A completion that was cut off at the token limit: count it as it is, or give it 0."""

    model_config = DatasetArgs.model_config | {"populate_by_name": True}

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.most is not None and self.least > self.most:
            raise ValueError(f"min {self.least} is above max {self.most}")
        return self


class Length(DatasetEnvironment[LengthArgs]):
    """Rewards 1 within a range of lengths, less outside."""

    id = "length"
    description = "Keep to a length. Reward: 1 from min to max, falling to 0 over slope units outside."
    args_model = LengthArgs

    def score(self, args: LengthArgs, example: reward_pb2.Example, rollout: reward_pb2.Rollout) -> reward_pb2.Score:
        """Counts."""
        match args.unit:
            case "tokens":
                length = rollout.num_tokens
            case "words":
                length = len(rollout.completion.split())
            case _:
                length = len(rollout.completion)
        above = 0 if args.most is None else max(0, length - args.most)
        reward = max(0.0, 1.0 - max(above, args.least - length, 0) / args.slope)
        if args.truncated == "zero" and rollout.finish_reason == common_pb2.FINISH_REASON_LENGTH:
            reward = 0.0
        return reward_pb2.Score(reward=reward, components={args.unit: float(length)})
