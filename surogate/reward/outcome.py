"""What a scorer gave for a rollout, checked: a score, or an error and never a reward of 0 in its place."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

from surogate.errors import InternalError, SurogateError
from surogate.reward_values import is_reward, why_not
from surogate.telemetry.log import get_logger
from surogate.v1 import reward_pb2

Outcome = reward_pb2.Score | SurogateError
Plain = Outcome | float
"""An outcome, where a reward alone may stand for a score with nothing else: a message less for almost every rollout."""

_log = get_logger("reward")


def score_of(outcome: Plain) -> Outcome:
    """The outcome as a message."""
    return reward_pb2.Score(reward=outcome) if isinstance(outcome, float) else outcome


def outcome_of(value: object) -> Plain:
    """The outcome for what a scorer returned or raised for one rollout."""
    match value:
        case float() if is_reward(value):  # what almost all scorers give
            return value
        case SurogateError():
            return value
        case Exception():
            # A scorer is somebody's code: whatever it raises is this item's error and nobody else's.
            _log.warning("scoring failed", exc_info=value)
            return InternalError(f"scoring failed: {type(value).__name__}: {value}")
        case reward_pb2.Score():
            score = value
        case numbers.Real():
            score = reward_pb2.Score(reward=float(value))
        case _:
            return InternalError(f"scoring gave a {type(value).__name__}, which is neither a number nor a Score")
    parts = score.components.values() if len(score.components) else ()  # even an empty map is slow to go through
    wrong = next((item for item in (score.reward, *parts) if not is_reward(item)), None)
    return score if wrong is None else InternalError(f"scoring gave {why_not(wrong)}, which no reward can be")


def group_outcomes(value: object, count: int) -> list[Plain]:
    """The outcomes for what a scorer returned or raised for a whole group."""
    if isinstance(value, Exception):
        return [outcome_of(value)] * count
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        found = f"a {type(value).__name__}"
    elif len(value) != count:
        found = f"{len(value)} rewards"
    else:
        return [outcome_of(item) for item in value]
    return [InternalError(f"scoring a group of {count} gave {found}, not a reward for each")] * count
