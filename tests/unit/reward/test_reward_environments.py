"""The built-in environments: what they ask, what they hold out, how they score, how they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_svc.environments.registry import built_in
from surogate.errors import InvalidInputError, NotFoundError
from surogate.reward.base import Split
from surogate.v1 import reward_pb2

REGISTRY = built_in()


def examples(environment: str, args: dict[str, Any], split: Split = Split.TRAIN, seed: int = 0) -> list[Any]:
    env = REGISTRY.get(environment)
    return list(env.examples(env.parse(args), split, seed))


def reward(environment: str, args: dict[str, Any], answer: str, completion: str) -> float:
    env = REGISTRY.get(environment)
    rollout = reward_pb2.Rollout(rollout_id="r", completion=completion)
    return env.score(env.parse(args), reward_pb2.Example(answer=answer), rollout).reward


def violations(environment: str, args: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(InvalidInputError) as caught:
        examples(environment, args)
    return {item.field: item.description for item in caught.value.violations}


GENERATED = [
    ("reverse-text", {}),
    ("reverse-text", {"alphabet": "abc ", "min_chars": 2, "max_chars": 6}),
    ("reverse-text", {"words": ["ab", "cd", "ef"], "min_words": 2, "max_words": 6, "min_chars": 5, "max_chars": 9}),
    ("arithmetic", {"max_value": 30, "operations": ["+", "-", "*", "/"]}),
]


@pytest.mark.parametrize(("environment", "args"), GENERATED)
def test_held_out_prompts_are_never_trained_on(environment: str, args: dict[str, Any]) -> None:
    held_out = {example.prompt[0].content for example in examples(environment, args, Split.EVAL, seed=7)}
    assert held_out
    for seed in range(3):
        trained = [example.prompt[0].content for example in examples(environment, args, Split.TRAIN, seed)]
        assert trained and len(set(trained)) == len(trained)
        assert not held_out & set(trained)


@pytest.mark.parametrize(("environment", "args"), GENERATED)
def test_examples_are_the_same_for_the_same_seed_and_have_unique_ids(environment: str, args: dict[str, Any]) -> None:
    first = examples(environment, args, seed=3)
    assert first == examples(environment, args, seed=3)
    assert first != examples(environment, args, seed=4)
    assert len({example.id for example in first}) == len(first)


@pytest.mark.parametrize(("environment", "args"), GENERATED)
def test_the_right_answer_earns_one(environment: str, args: dict[str, Any]) -> None:
    for example in examples(environment, args | {"num_examples": 50}):
        assert reward(environment, args, example.answer, f" {example.answer} ") == 1.0


def test_as_many_examples_as_asked_for() -> None:
    args = {"num_examples": 17, "eval_examples": 5}
    assert len(examples("reverse-text", args)) == 17
    assert len(examples("reverse-text", args, Split.EVAL)) == 5


def test_a_small_world_gives_what_it_has() -> None:
    args = {"max_value": 3, "operations": ["+"], "num_examples": 1000}
    both = examples("arithmetic", args) + examples("arithmetic", args, Split.EVAL)
    assert len({example.id for example in both}) == 16


def test_reverse_text_prompt_and_answer() -> None:
    example = examples("reverse-text", {"instruction": "Reverse: ", "system_prompt": "Be brief."})[0]
    text = example.fields["text"]
    assert [(message.role, message.content) for message in example.prompt] == [
        ("system", "Be brief."),
        ("user", f"Reverse: {text}"),
    ]
    assert example.answer == text[::-1]


def test_reverse_text_rewards_partly_right_completions() -> None:
    assert reward("reverse-text", {}, "cba", "cb") == 2 * 2 / 5
    assert reward("reverse-text", {}, "cba", "") == 0.0


@pytest.mark.parametrize(
    ("completion", "expected"), [("42", 1.0), ("42.0", 1.0), ("40 + 2 = 42", 1.0), ("41", 0.0), ("?", 0.0)]
)
def test_arithmetic_compares_by_value(completion: str, expected: float) -> None:
    assert reward("arithmetic", {}, "42", completion) == expected


@settings(max_examples=50)
@given(st.integers(-100, 100), st.integers(0, 100), st.integers(0, 2**31))
def test_arithmetic_answers_are_right(least: int, extent: int, seed: int) -> None:
    args = {"min_value": least, "max_value": least + extent, "operations": ["+", "-", "*"], "num_examples": 5}
    for example in examples("arithmetic", args, seed=seed):
        a, b = int(example.fields["a"]), int(example.fields["b"])
        assert int(example.answer) == {"+": a + b, "-": a - b, "*": a * b}[example.fields["op"]]


def test_exact_match_reads_every_format(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "answer": f"a{i}"} for i in range(20)]
    files = {
        "data.jsonl": "\n".join(map(json.dumps, rows)),
        "data.json": json.dumps(rows),
        "data.csv": "prompt,answer\n" + "\n".join(f"{row['prompt']},{row['answer']}" for row in rows),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        args = {"dataset": str(tmp_path / name)}
        trained, held_out = examples("exact-match", args), examples("exact-match", args, Split.EVAL)
        assert (len(trained), len(held_out)) == (18, 2)
        both = {(example.prompt[0].content, example.answer) for example in trained + held_out}
        assert both == {(row["prompt"], row["answer"]) for row in rows}


def test_exact_match_with_a_held_out_file_and_messages(tmp_path: Path) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": conversation, "answer": 3}, {"prompt": "held out", "answer": "x"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "eval.jsonl").write_text(json.dumps(rows[1]))
    args = {"dataset": str(tmp_path / "train.jsonl"), "eval_dataset": str(tmp_path / "eval.jsonl")}
    (example,) = examples("exact-match", args | {"system_prompt": "S"})
    assert [message.role for message in example.prompt] == ["system", "user"]
    assert example.answer == "3"
    (held_out,) = examples("exact-match", args, Split.EVAL)
    assert held_out.prompt[0].content == "held out"


def test_exact_match_scoring(tmp_path: Path) -> None:
    base = {"dataset": "unused"}
    assert reward("exact-match", base, "Paris", " Paris\n") == 1.0
    assert reward("exact-match", base, "Paris", "paris") == 0.0
    assert reward("exact-match", base | {"normalize": ["strip", "lowercase"]}, "Paris", "paris") == 1.0
    assert reward("exact-match", base | {"match": "contains"}, "Paris", "It is Paris.") == 1.0
    assert reward("exact-match", base | {"answer_prefix": "####"}, "7", "1+6 #### 7") == 1.0
    assert reward("exact-match", base | {"answer_prefix": "####"}, "7", "7") == 0.0
    assert reward("exact-match", base | {"normalise": ["number"]}, "1200", "It costs 1,200.0") == 1.0


@pytest.mark.parametrize(
    ("environment", "args", "field", "says"),
    [
        ("reverse-text", {"max_word": 3}, "env[].args.max_word", "did you mean max_words?"),
        ("reverse-text", {"max_words": "many"}, "env[].args.max_words", "integer"),
        ("reverse-text", {"max_words": 0}, "env[].args.max_words", "greater than or equal to 1"),
        ("reverse-text", {"min_words": 9, "max_words": 3}, "env[].args", "min_words 9 is above max_words 3"),
        ("reverse-text", {"dataset": "/no/such.txt"}, "env[].args.dataset", "no file /no/such.txt"),
        ("reverse-text", {"min_chars": 900, "max_chars": 901}, "env[].args.max_chars", "widen"),
        ("arithmetic", {"operations": ["^"]}, "env[].args.operations.0", "'+', '-', '*' or '/'"),
        ("arithmetic", {"template": "{a} and {b}"}, "env[].args.template", "must contain {op}"),
        ("exact-match", {}, "env[].args.dataset", "is required"),
        ("exact-match", {"dataset": "data.parquet"}, "env[].args.dataset", "convert it"),
    ],
)
def test_bad_arguments_name_the_key(environment: str, args: dict[str, Any], field: str, says: str) -> None:
    assert says in violations(environment, args)[field]


@pytest.mark.parametrize(
    ("name", "text", "key", "says"),
    [
        ("empty.jsonl", "", "dataset", "has no rows"),
        ("bad.jsonl", '{"prompt": "p", "answer": "a"}\nnot json\n', "dataset", "line 2 is not JSON"),
        ("list.jsonl", "[1]\n", "dataset", "line 1 is not an object"),
        ("object.json", "{}", "dataset", "expected a list"),
        ("column.jsonl", '{"question": "p", "answer": "a"}', "prompt_field", "row 1 has no column 'prompt'"),
    ],
)
def test_bad_datasets_name_the_key(tmp_path: Path, name: str, text: str, key: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    assert says in violations("exact-match", {"dataset": str(tmp_path / name)})[f"env[].args.{key}"]


def test_unknown_environment_lists_the_known_ones() -> None:
    with pytest.raises(NotFoundError, match="reverse-text, arithmetic, exact-match"):
        REGISTRY.get("reverse_text")
