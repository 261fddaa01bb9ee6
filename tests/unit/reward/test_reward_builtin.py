"""The built-in environments on datasets of the user's: regex, json-schema, format, length, mixture."""

import json
from pathlib import Path
from typing import Any

import pytest

from reward_svc.environments.registry import built_in
from surogate.errors import DeadlineError, InvalidInputError
from surogate.reward import Split
from surogate.structs import to_struct
from surogate.v1 import common_pb2, reward_pb2
from tests.helpers.reward.rewards import group, outcomes, reward_stub

REGISTRY = built_in()


def score(environment: str, args: dict[str, Any], completion: str, *, answer: str = "", **others: Any) -> Any:
    env = REGISTRY.get(environment)
    fields = to_struct(others.pop("fields", {}))
    rollout = reward_pb2.Rollout(rollout_id="r", completion=completion, **others)
    return env.score(env.parse(args), reward_pb2.Example(answer=answer, fields=fields), rollout)


@pytest.mark.parametrize(
    ("args", "completion", "answer", "expected"),
    [
        ({"pattern": r"\d+"}, "no 12 no", "", 1.0),
        ({"pattern": r"\d+"}, "none", "", 0.0),
        ({"pattern": r"\d+", "match": "fullmatch"}, " 12\n", "", 1.0),
        ({"pattern": r"\d+", "match": "fullmatch"}, "12 or so", "", 0.0),
        ({"pattern": "YES", "flags": ["ignore_case"]}, "yes", "", 1.0),
        ({"pattern": r"answer: (\w+)", "group": 1}, "answer: a, no, answer: b", "b", 1.0),
        ({"pattern": r"answer: (?P<it>\w+)", "group": "it"}, "answer: a", "b", 0.0),
    ],
)
def test_regex(args: dict[str, Any], completion: str, answer: str, expected: float) -> None:
    assert score("regex", args, completion, answer=answer).reward == expected


def test_regex_prefers_the_pattern_of_the_example() -> None:
    assert score("regex", {"pattern": "a"}, "b", fields={"pattern": "b"}).reward == 1.0
    with pytest.raises(InvalidInputError, match=r"needs args\.pattern"):
        score("regex", {}, "b")
    with pytest.raises(InvalidInputError, match="cannot use the pattern"):
        score("regex", {"pattern": "a", "group": 3}, "a")


def test_a_pattern_that_backtracks_for_ever_is_an_error_in_time() -> None:
    with pytest.raises(DeadlineError, match=r"longer than 0\.2 s"):
        score("regex", {"pattern": "(a|aa)+$", "timeout": 0.2}, "a" * 5000 + "b")


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[a-z]+$"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ('{"name": "ada", "age": 36}', 1.0),
        ('Here it is:\n```json\n{"name": "ada", "age": 36}\n```\nDone.', 1.0),
        ('{"name": "ada"}', 0.25),
        ('{"name": "ADA", "age": 1}', 0.25),
        ('{"name": "ada", "age": NaN}', 0.0),
        ("not json", 0.0),
        ("", 0.0),
        ("[" * 90_000, 0.0),
        ('{"age": ' + "9" * 5000 + "}", 0.0),
        (" " * 200_000, 0.0),
    ],
)
def test_json_schema(completion: str, expected: float) -> None:
    assert score("json-schema", {"schema": SCHEMA, "parsed_reward": 0.25}, completion).reward == expected


def test_a_schema_that_refers_to_itself_without_end_is_an_error() -> None:
    for schema in ({"$ref": "#"}, {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"not": {"$ref": "#"}}}}):
        with pytest.raises(InvalidInputError, match="refers to itself without end"):
            score("json-schema", {"schema": schema}, "{}")


@pytest.mark.parametrize(
    "pattern", ["a{1000000}", "(?:a{1000}){1000}", "((a{100}){100}){100}", "(?:[a-z]b{99}){9999}", "x{5}" * 50_000]
)
def test_a_pattern_that_repeats_too_often_is_refused_before_it_is_compiled(pattern: str) -> None:
    with pytest.raises(InvalidInputError, match="repeats too often"):
        score("regex", {}, "a", fields={"pattern": pattern})


@pytest.mark.parametrize(
    "pattern",
    [
        r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
        r"(\w{1,100} ){0,10000}\{5}",
        "(?:a{10}b{10}c{10}d{10}e{10}f{10}){3}",
    ],
)
def test_ordinary_counts_are_not_refused(pattern: str) -> None:
    assert score("regex", {"pattern": pattern}, "a").reward == 0.0


def test_json_schema_of_the_example_and_wrong_schemas() -> None:
    assert score("json-schema", {}, "3", fields={"schema": {"type": "integer"}}).reward == 1.0
    assert score("json-schema", {}, '"x"', fields={"schema": '{"type": "integer"}'}).reward == 0.0
    with pytest.raises(InvalidInputError, match="is missing"):
        score("json-schema", {}, "3")
    with pytest.raises(InvalidInputError, match="no JSON Schema"):
        REGISTRY.get("json-schema").parse({"schema": {"type": "whole number"}})
    with pytest.raises(InvalidInputError, match="not in the schema"):  # and nothing is fetched
        score("json-schema", {"schema": {"$ref": "http://127.0.0.1:9/schema.json"}}, "3")


def test_a_schema_whose_pattern_backtracks_for_ever_is_an_error_in_time() -> None:
    with pytest.raises(DeadlineError):
        score("json-schema", {"schema": {"type": "string", "pattern": "(a|aa)+$"}}, json.dumps("a" * 5000 + "b"))


THINK = {"tags": ["think", "answer"], "nothing_outside": True}


@pytest.mark.parametrize(
    ("args", "completion", "expected"),
    [
        (THINK, "<think>hm</think>\n<answer>3</answer>", 1.0),
        (THINK, "<think>hm</think> so <answer>3</answer>", 2 / 3),
        (THINK, "<answer>3</answer><think>hm</think>", 1 / 3),
        (THINK, "<think><answer>3</answer></think>", 1 / 3),
        (THINK, "<think>a</think><think>b</think><answer>3</answer>", 1 / 3),
        (THINK | {"partial": False}, "<answer>3</answer>", 0.0),
        ({"starts_with": "Dear", "ends_with": "Bye."}, "Dear you. Bye.\n", 1.0),
        ({"contains": ["a", "b"], "forbids": ["c"]}, "a c", 1 / 3),
    ],
)
def test_format(args: dict[str, Any], completion: str, expected: float) -> None:
    assert score("format", args, completion).reward == pytest.approx(expected)


@pytest.mark.parametrize(
    ("args", "tokens", "expected"),
    [
        ({"max": 100}, 100, 1.0),
        ({"max": 100, "slope": 50}, 125, 0.5),
        ({"max": 100, "slope": 50}, 300, 0.0),
        ({"min": 20, "slope": 10}, 15, 0.5),
        ({"max": 100, "truncated": "zero"}, 100, 0.0),
    ],
)
def test_length_in_tokens(args: dict[str, Any], tokens: int, expected: float) -> None:
    cut_off = common_pb2.FINISH_REASON_LENGTH
    assert score("length", args, "x", num_tokens=tokens, finish_reason=cut_off).reward == expected


def test_length_in_words_and_characters() -> None:
    assert score("length", {"unit": "words", "min": 3, "slope": 2}, "one two").reward == 0.5
    assert score("length", {"unit": "characters", "max": 3, "slope": 4}, "four").reward == 0.75


MIXTURE = {
    "parts": [
        {"id": "regex", "weight": 3, "args": {"pattern": "a"}},
        {"id": "length", "weight": 1, "name": "short", "args": {"unit": "characters", "max": 2, "slope": 2}},
    ]
}


async def test_mixture_adds_up_and_names_its_parts() -> None:
    async with reward_stub(*REGISTRY.usable()) as stub:
        response = await stub.ScoreRollouts(group("mixture", "a", "bbb", args=MIXTURE))
        assert outcomes(response) == [1.0, 0.125]
        assert response.results[0].score.components == {
            "regex": 1.0,
            "regex.matched": 1.0,
            "short": 1.0,
            "short.characters": 1.0,
        }
        plain = MIXTURE | {"normalize": False}
        assert outcomes(await stub.ScoreRollouts(group("mixture", "a", args=plain))) == [4.0]


async def test_a_part_that_cannot_score_is_an_error_of_its_rollout() -> None:
    parts = [{"id": "regex", "args": {"pattern": "(a|aa)+$", "timeout": 0.1}}, {"id": "length"}]
    async with reward_stub(*REGISTRY.usable()) as stub:
        response = await stub.ScoreRollouts(group("mixture", "aa", "a" * 5000 + "b", args={"parts": parts}))
        assert outcomes(response) == [1.0, "DEADLINE_EXCEEDED"]


@pytest.mark.parametrize(
    ("parts", "field", "says"),
    [
        ([], "env[].args.parts", "at least 1"),
        ([{"id": "regx"}], "env[].args.parts.0.id", "no environment 'regx'"),
        ([{"id": "length"}, {"id": "mixture"}], "env[].args.parts.1.id", "part of a mixture"),
        ([{"id": "length", "args": {"maxx": 3}}], "env[].args.parts.0.args.maxx", "unknown argument"),
    ],
)
async def test_a_wrong_mixture_names_the_key(parts: list[Any], field: str, says: str) -> None:
    async with reward_stub(*REGISTRY.usable()) as stub:
        with pytest.raises(InvalidInputError) as caught:
            await stub.ScoreRollouts(group("mixture", "a", args={"parts": parts}))
    assert says in {item.field: item.description for item in caught.value.violations}[field]


def test_prompts_of_a_mixture(tmp_path: Path) -> None:
    mixture = REGISTRY.get("mixture")
    args = mixture.parse({"parts": [{"id": "length"}, {"id": "arithmetic", "args": {"num_examples": 7}}]})
    assert len(list(mixture.examples(args, Split.TRAIN, 0))) == 7
    rows = [{"prompt": f"p{n}", "schema": {"type": "integer"}} for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = mixture.parse({"parts": [{"id": "json-schema"}], "dataset": str(tmp_path / "rows.jsonl")})
    examples = list(mixture.examples(args, Split.TRAIN, 0))
    assert len(examples) == 9 and examples[0].fields["schema"]["type"] == "integer"
    with pytest.raises(InvalidInputError, match="no part of the mixture has prompts"):
        mixture.examples(mixture.parse({"parts": [{"id": "length"}]}), Split.TRAIN, 0)


@pytest.mark.parametrize(
    ("environment", "args", "field"),
    [
        ("regex", {"pattern": "("}, "env[].args.pattern"),
        ("length", {"min": 3, "max": 2}, "env[].args"),
        ("format", {}, "env[].args"),
        ("json-schema", {"schema": {"type": 3}}, "env[].args.schema"),
    ],
)
def test_wrong_arguments_name_the_key(environment: str, args: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        REGISTRY.get(environment).parse(args)
    assert [item.field for item in caught.value.violations] == [field]
