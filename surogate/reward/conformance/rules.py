"""What every answer to ScoreRollouts must keep to, whatever was asked. A broken rule is kept with its first case."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from surogate.reward.conformance.findings import Finding, Verdict
from surogate.reward_values import MAX_REWARD, is_reward, why_not
from surogate.v1 import reward_pb2

_RESULTS = "ScoreRolloutsResponse.results"


@dataclass(frozen=True)
class Rule:
    """One rule: how it is told kept, where it is looked at, and what to do when it is broken."""

    name: str
    kept: str
    where: str
    do: str


RULES = {
    rule.name: rule
    for rule in (
        Rule("count", "one result for each rollout", _RESULTS, "answer one result for each rollout of the request"),
        Rule(
            "ids",
            "results are about the rollouts of the request, each once",
            f"{_RESULTS}[].rollout_id",
            "copy rollout_id from the request's rollout; keep nothing from one call to the next",
        ),
        Rule("order", "results are in the order of the request", _RESULTS, "answer in the order of the request"),
        Rule(
            "outcome",
            "every result has a score or an error",
            f"{_RESULTS}[].outcome",
            "set `score`, also for a reward of 0, or `error` for what cannot be scored",
        ),
        Rule(
            "finite",
            "rewards and components are finite",
            f"{_RESULTS}[].score",
            f"answer `error` where a reward cannot be computed; NaN and more than {MAX_REWARD:g} are refused",
        ),
        Rule(
            "bounds",
            "rewards are within min_reward and max_reward",
            f"{_RESULTS}[].score.reward",
            "correct the reward, or min_reward and max_reward of ListEnvironments",
        ),
        Rule(
            "error-code",
            "errors have a code",
            f"{_RESULTS}[].error.code",
            "set a google.rpc.Code other than OK (0), and a message that says why",
        ),
    )
}


class RuleBook:
    """The rules for one environment, and the first answer that broke each."""

    def __init__(self, environment: reward_pb2.Environment) -> None:
        self._environment = environment
        self._broken: dict[str, tuple[str, str, int]] = {}
        self._answers = 0

    def judge(
        self, asked: reward_pb2.ScoreRolloutsRequest, answer: reward_pb2.ScoreRolloutsResponse, call: str
    ) -> None:
        """Notes what is wrong with an answer; `call` says which one it was."""
        self._answers += 1
        for rule, what in dict(_broken(self._environment, asked, answer)).items():
            first, where, times = self._broken.get(rule, (what, call, 0))
            self._broken[rule] = (first, where, times + 1)

    def findings(self) -> Iterator[Finding]:
        """One for each rule; none at all if nothing was ever answered."""
        for rule in RULES.values() if self._answers else ():
            if rule.name not in self._broken:
                yield Finding(rule.name, Verdict.OK, rule.kept, environment=self._environment.id)
                continue
            what, call, times = self._broken[rule.name]
            where = f"{rule.where}, {call}" + (f" and {times - 1} more" if times > 1 else "")
            yield Finding(rule.name, Verdict.FAIL, what, where, rule.do, self._environment.id)


def _broken(
    environment: reward_pb2.Environment,
    asked: reward_pb2.ScoreRolloutsRequest,
    answer: reward_pb2.ScoreRolloutsResponse,
) -> Iterator[tuple[str, str]]:
    wanted = [rollout.rollout_id for rollout in asked.rollouts]
    given = [result.rollout_id for result in answer.results]
    if len(wanted) != len(given):
        yield "count", f"asked about {len(wanted)} rollouts, it answered {len(given)}"
    others = [name for name in given if name not in set(wanted)]
    if others:
        yield "ids", f"it answered about {others[0]!r}, which was not asked"
    elif len(set(given)) < len(given):
        yield "ids", f"it answered twice about {next(name for name in given if given.count(name) > 1)!r}"
    elif len(wanted) == len(given) and wanted != given:
        place = next(i for i, (a, b) in enumerate(zip(wanted, given, strict=True)) if a != b)
        yield "order", f"result {place} is about {given[place]!r}, rollout {place} of the request is {wanted[place]!r}"
    for result in answer.results:
        yield from _broken_by(environment, result)


def _broken_by(environment: reward_pb2.Environment, result: reward_pb2.RolloutResult) -> Iterable[tuple[str, str]]:
    name, outcome = result.rollout_id, result.WhichOneof("outcome")
    if outcome is None:
        yield "outcome", f"{name} was answered with neither a score nor an error"
    elif outcome == "error" and not 1 <= result.error.code <= 16:
        yield "error-code", f"the error of {name} has the code {result.error.code}"
    elif outcome == "score":
        reward = result.score.reward
        parts = {"reward": reward} | {f"component {key!r}": value for key, value in result.score.components.items()}
        wrong = next((part for part, value in parts.items() if not is_reward(value)), None)
        if wrong:
            yield "finite", f"the {wrong} of {name} is {why_not(parts[wrong])}"
        if environment.HasField("min_reward") and reward < environment.min_reward:
            yield "bounds", f"the reward of {name} is {reward:g}, below min_reward {environment.min_reward:g}"
        if environment.HasField("max_reward") and reward > environment.max_reward:
            yield "bounds", f"the reward of {name} is {reward:g}, above max_reward {environment.max_reward:g}"
