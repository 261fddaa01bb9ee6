"""What a reward service answers about a group, believed only as far as it makes sense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator_svc.grpo.groups import Rollout
from surogate.errors import DataLossError, SurogateError
from surogate.reward_values import is_reward, why_not
from surogate.rpc.status import from_status
from surogate.v1 import reward_pb2
from surogate.visible import visible

MAX_COMPONENTS = 64
"""Named parts of a reward: each becomes a metric."""

MAX_COMPONENT_NAME = 128
"""Characters of a part's name."""

MAX_WORDS = 500
"""Characters of what a service says that people are shown."""


def take_rewards(
    environment: str, rollouts: Sequence[Rollout], response: reward_pb2.ScoreRolloutsResponse
) -> tuple[list[Rollout], str]:
    """Fills in `reward` and `components`; returns the rollouts that were scored, and what went wrong with others.

    Raises:
        DataLossError: The answer is not about these rollouts, each once, in their order.
    """
    reason, what = _mismatch(
        [rollout.rollout_id for rollout in rollouts], [item.rollout_id for item in response.results]
    )
    if reason:
        raise DataLossError(f"environment {environment}: the reward service {what}", reason=reason)
    scored, problem = [], ""
    for rollout, result in zip(rollouts, response.results, strict=True):
        found = _taken(rollout, result)
        if found:
            problem = problem or f"environment {environment}: {found}"
        else:
            scored.append(rollout)
    return scored, problem


def _mismatch(asked: Sequence[str], answered: Sequence[str]) -> tuple[str, str]:
    """Reason and words for an answer that is about something else; empty for one that fits."""
    if asked == answered:
        return "", ""
    known = set(asked)
    strange = next((name for name in answered if name not in known), None)
    if strange is not None:
        return "WRONG_ROLLOUT", f"answered about rollout {strange[:80]!r}, which it was not asked about"
    if len(set(answered)) < len(answered):
        twice = next(name for name in answered if answered.count(name) > 1)
        return "ROLLOUT_TWICE", f"answered twice about rollout {twice!r}"
    if len(answered) != len(asked):
        return "WRONG_REWARD_COUNT", f"was asked about {len(asked)} rollouts and answered {len(answered)}"
    return "WRONG_ORDER", "answered in another order than it was asked in"


def _taken(rollout: Rollout, result: reward_pb2.RolloutResult) -> str:
    """Fills in the score if it is one; else returns what is wrong."""
    outcome = result.WhichOneof("outcome")
    if outcome == "error":
        return f"rollout {rollout.rollout_id} could not be scored: {words_of(from_status(result.error))}"
    if outcome is None:
        return f"rollout {rollout.rollout_id} was answered with neither a score nor an error"
    score = result.score
    reward, parts = score.reward, score.components
    components = dict(parts) if len(parts) else {}  # a map of protobuf is slow to look into, even an empty one
    wrong = _wrong_score(rollout.rollout_id, reward, components)
    if not wrong:
        rollout.reward, rollout.components = reward, components
    return wrong


def _wrong_score(rollout: str, reward: float, components: Mapping[str, float]) -> str:
    if not is_reward(reward):
        return f"the reward of rollout {rollout} is {why_not(reward)}"
    if len(components) > MAX_COMPONENTS:
        return f"the reward of rollout {rollout} has {len(components)} components, more than {MAX_COMPONENTS}"
    for name, value in components.items():
        if len(name) > MAX_COMPONENT_NAME:
            return f"a component of rollout {rollout} has a name of {len(name)} characters"
        if not is_reward(value):
            return f"the component {name!r} of rollout {rollout} is {why_not(value)}"
    return ""


def words_of(error: SurogateError) -> str:
    """What a service says went wrong, its beginning, for people."""
    said = str(error) or error.reason
    return visible(said if len(said) <= MAX_WORDS else f"{said[:MAX_WORDS]}…")
