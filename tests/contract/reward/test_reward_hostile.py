"""Completions of a MiB that are made to hold the service up: each is scored or given up, and others are scored."""

import asyncio
import json
from typing import Any

import pytest

from reward_svc.environments.registry import built_in
from surogate.reward.registry import Registry
from tests.helpers.reward.rewards import group, outcomes, reward_stub

MIB = 1 << 20
MARKS = "a" + "\u0315\u0300" * (MIB // 4)  # sorted by Unicode's rules
_NODE = {"$ref": "#/$defs/n"}
TREE = {"$defs": {"n": {"anyOf": [{"type": "array", "items": _NODE}] * 2}}, **_NODE}
PAIRS = {"uniqueItems": True}
BACKSLASHES = '"' + '\\"' * 49_000
HOSTILE: dict[str, tuple[str, dict[str, Any], str, list[Any]]] = {
    "reverse-text": ("reverse-text", {}, "x" * MIB, [0.0]),
    "reverse-text, of its letters": ("reverse-text", {}, "ab" * (MIB // 2), [pytest.approx(0, abs=1e-4)]),
    "arithmetic, a number": ("arithmetic", {}, "9" * MIB, [0.0]),
    "arithmetic, numbers": ("arithmetic", {}, ")-1" * (MIB // 3), [0.0]),
    "exact-match, marks": ("exact-match", {"normalize": ["unicode"]}, MARKS, [0.0]),
    "exact-match, halfwidth marks": ("exact-match", {"normalize": ["unicode"]}, "\u0315\uff9e" * (MIB // 6), [0.0]),
    "exact-match, all": (
        "exact-match",
        {"normalize": ["strip", "lowercase", "whitespace", "punctuation", "articles", "unicode", "number"]},
        "a, " * (MIB // 3),
        [0.0],
    ),
    "regex, nested": ("regex", {"pattern": "^(a+)+$"}, "a" * (MIB - 1) + "b", ["DEADLINE_EXCEEDED"]),
    "regex, from everywhere": ("regex", {"pattern": "(?:a|aa)+b"}, "a" * MIB, ["DEADLINE_EXCEEDED"]),
    "regex, each letter": ("regex", {"pattern": "(?:.*?,){9}b"}, "a," * (MIB // 2), ["DEADLINE_EXCEEDED"]),
    "json-schema, too long": ("json-schema", {"schema": {}}, "[" * MIB, [0.0]),
    "json-schema, nested": ("json-schema", {"schema": {}}, "[" * 50_000 + "]" * 50_000, [0.0]),
    "json-schema, a string": ("json-schema", {"schema": {}}, BACKSLASHES, [0.0]),
    "json-schema, a number": ("json-schema", {"schema": {}}, "9" * 99_000, [0.0]),
    "json-schema, a large number": ("json-schema", {"schema": {"multipleOf": 0.1}}, "1e400", [0.0]),
    "json-schema, alike": ("json-schema", {"schema": PAIRS}, json.dumps([{"a": n} for n in range(6000)]), [1.0]),
    "json-schema, a tree": ("json-schema", {"schema": TREE}, "[" * 40 + "2" + "]" * 40, ["DEADLINE_EXCEEDED"]),
    "json-schema, patterns": (
        "json-schema",
        {"schema": {"items": {"pattern": "^(a|aa)+$"}}},
        json.dumps(["a" * 60 + "b"] * 1000),
        ["DEADLINE_EXCEEDED"],
    ),
    "format": ("format", {"tags": ["think", "answer"]}, "<think>" * (MIB // 7), [0.0]),
    "length": ("length", {"unit": "words", "max": 5}, "a " * (MIB // 2), [0.0]),
    "code, fences": ("code", {}, "```\n" * (MIB // 4), [0.0]),
    "code, brackets": ("code", {}, "(" * 99_000, [0.0]),
    "code, too long": ("code", {}, "x" * MIB, [0.0]),
}
MATH = {
    "digits": "9" * MIB,
    "powers": r"\boxed{" + "9^" * 20 + "9}",
    "factorials": r"\boxed{(((9!)!)!)!}",
    "brackets": r"\boxed{" + "(" * 20_000 + "1" + ")" * 20_000 + "}",
    "fractions": r"$" + r"\frac{1}{" * 3000 + "2" + "}" * 3000 + "$",
    "boxes": r"\boxed{" * (MIB // 7),
}
FIELDS = {"tests": [{"input": "", "output": "DONE"}]}


async def _while(running: "asyncio.Future[Any]", stub: Any) -> int:
    """Scores sums until something else is done; returns how often."""
    rounds = 0
    while not running.done():
        assert outcomes(await stub.ScoreRollouts(group("arithmetic", "it is 7", answer="7"), timeout=30)) == [1.0]
        rounds += 1
        await asyncio.sleep(0.01)
    return rounds


def _registry() -> Registry:
    return built_in(processes=2)


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_completion_costs_only_itself(name: str) -> None:
    environment, args, completion, expected = HOSTILE[name]
    answer = "6" if environment == "arithmetic" else "ba"
    request = group(environment, completion, answer=answer, args=args | _DATASET.get(environment, {}), fields=FIELDS)
    async with reward_stub(*map(_registry().get, {environment, "arithmetic"}), item_timeout=60) as stub:
        scoring = asyncio.ensure_future(stub.ScoreRollouts(request, timeout=90))
        assert await _while(scoring, stub) > 0
        assert outcomes(await scoring) == expected


async def test_hostile_mathematics_costs_only_itself() -> None:
    async with reward_stub(*map(_registry().get, ("math", "arithmetic")), item_timeout=60) as stub:
        request = group("math", *MATH.values(), answer="42", args={"timeout": 1})
        scoring = asyncio.ensure_future(stub.ScoreRollouts(request, timeout=120))
        assert await _while(scoring, stub) > 0
        found = dict(zip(MATH, outcomes(await scoring), strict=True))
        assert {name: value for name, value in found.items() if value not in (0.0, "DEADLINE_EXCEEDED")} == {}
        assert outcomes(await stub.ScoreRollouts(group("math", r"\boxed{42}", answer="42"), timeout=60)) == [1.0]


_DATASET = {"exact-match": {"dataset": "unused.jsonl"}}
