"""YAML files: what they say, where they say it, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surogate.config.load import Document, load_yaml, parse_yaml
from surogate.config.overrides import apply_job_overrides, apply_overrides
from surogate.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-1", -1),
        ("010", 10),
        ("0x10", 16),
        ("0o10", 8),
        ("1_000", 1000),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("'2e-4'", "2e-4"),
        ("[1, a, null]", [1, "a", None]),
        ("{b: 2.5}", {"b": 2.5}),
    ],
)
def test_values_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    read = parse_yaml(f"a: {text}", "f.yaml").data["a"]
    assert read == value
    assert type(read) is type(value)


def test_every_key_knows_its_line() -> None:
    document = parse_yaml("a: 1\nenv:\n  - id: x\n    args:\n      n: 2\n  - id: y\n", "f.yaml")
    assert {key: document.where(key) for key in ("a", "env", "env.0.args.n", "env.1.id")} == {
        "a": "f.yaml:1",
        "env": "f.yaml:2",
        "env.0.args.n": "f.yaml:5",
        "env.1.id": "f.yaml:6",
    }
    assert document.where("env.0.args.missing") == "f.yaml:4"
    assert document.where("missing") == "f.yaml"


def test_anchors_and_merges() -> None:
    document = parse_yaml("base: &b {x: 1, y: 2}\nother:\n  <<: *b\n  y: 3\n", "f.yaml")
    assert document.data["other"] == {"x": 1, "y": 3}


def test_an_empty_file_sets_nothing() -> None:
    assert parse_yaml("# nothing\n", "f.yaml").data == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "f.yaml:4: c: is there twice, first on line 3"),
        ("- 1\n", "f.yaml:1: must be a mapping (lines of `key: value`)"),
        ("just words\n", "f.yaml:1: must be a mapping (lines of `key: value`)"),
        ("a: 1\n7: 2\n", "f.yaml:2: keys must be strings, got '7'"),
        (
            "a: 1\n\tb: 2\n",
            "f.yaml:2: is not YAML: found character '\\t' that cannot start any token; indent with spaces, not tabs",
        ),
        ("a: 1\nb: \0\n", "f.yaml:2: is not YAML: the character U+0000 must not be in a text file"),
        ("a: 1\nb: {c: !!int x}\n", "f.yaml:2: b.c: cannot be read as int: 'x'"),
        ("a: !!bool x\n", "f.yaml:1: a: cannot be read as bool: 'x'"),
        ("a: !!float x\n", "f.yaml:1: a: cannot be read as float: 'x'"),
        ("a: !!timestamp x\n", "f.yaml:1: a: the tag !!timestamp means nothing here: remove it"),
        (f"a: {'9' * 5000}\n", f"f.yaml:1: a: cannot be read as int: '{'9' * 40}…'"),
        ("!!set {a}\n", "f.yaml:1: the tag !!set means nothing here: remove it"),
        ("? [a]\n: b\n", "f.yaml:1: keys must be strings, got a list or a mapping"),
        ("a: " + "[" * 2000, "f.yaml: is nested too deeply"),
        ("a: " + "[" * 900 + "]" * 900, "f.yaml: is nested too deeply"),
        ("a: b: c\n", "f.yaml:1: is not YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: is not YAML: but found another document"),
        ("&x {a: *x}\n", "f.yaml:1: is too large, or contains itself"),
    ],
)
def test_what_is_wrong_has_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f.yaml")
    assert str(caught.value) == message


def test_code_is_never_run() -> None:
    with pytest.raises(ConfigError, match=r"a: the tag !!python/object/apply:os\.getcwd means nothing here"):
        parse_yaml("a: !!python/object/apply:os.getcwd []\n", "f.yaml")


def test_aliases_do_not_explode() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    with pytest.raises(ConfigError, match="is too large"):
        parse_yaml("\n".join(lines), "f.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (tmp_path / "missing.yaml", "no such file"),
        (tmp_path, "is a folder, not a file"),
        (binary, "is not UTF-8 text"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_yaml(path)
        assert str(caught.value) == f"{path}: {message}"


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert isinstance(parse_yaml(text, "f.yaml"), Document)
    except ConfigError as error:
        assert str(error).startswith("f.yaml")


def document() -> Document:
    return parse_yaml("learning_rate: 1e-3\nenv:\n  - id: x\n    args: {n: 1}\n", "f.yaml")


def test_overrides_reach_into_lists_and_blocks() -> None:
    changed = apply_overrides(document(), ["learning_rate=2e-4", "env.0.args.n=5", "loss.type=gspo", "tags=[a, b]"])
    assert changed.data == {
        "learning_rate": 2e-4,
        "env": [{"id": "x", "args": {"n": 5}}],
        "loss": {"type": "gspo"},
        "tags": ["a", "b"],
    }
    assert changed.where("env.0.args.n") == "--set env.0.args.n=5"
    assert changed.where("env.0.id") == "f.yaml:3"
    assert document().data["learning_rate"] == 1e-3


def test_an_override_may_hold_an_equals_sign() -> None:
    assert apply_overrides(document(), ["system=a=b"]).data["system"] == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("x", "x: --set x: must be of the form key=value, such as learning_rate=1e-4"),
        ("=1", "--set =1: must be of the form key=value, such as learning_rate=1e-4"),
        ("a..b=1", "a..b: --set a..b=1: must be of the form key=value, such as learning_rate=1e-4"),
        ("env.1.id=y", "env.1.id: --set env.1.id=y: `1` must be an index from 0 to 0 of a list of 1"),
        ("env.first.id=y", "env.first.id: --set env.first.id=y: `first` must be an index from 0 to 0 of a list of 1"),
        ("learning_rate.x=1", "learning_rate.x: --set learning_rate.x=1: `learning_rate` is 0.001, which has no keys"),
    ],
)
def test_overrides_that_cannot_be_applied(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(document(), [override])
    assert str(caught.value) == message


def test_overrides_of_several_files_say_which() -> None:
    documents = {"train": document(), "orch": document()}
    changed = apply_job_overrides(documents, ["train.learning_rate=1", "orch.env.0.id=z"])
    assert changed["train"].data["learning_rate"] == 1
    assert changed["orch"].data["env"][0]["id"] == "z"
    assert changed["train"].where("learning_rate") == "--set train.learning_rate=1"
    with pytest.raises(ConfigError) as caught:
        apply_job_overrides(documents, ["tran.learning_rate=1"])
    assert str(caught.value) == (
        "tran.learning_rate: --set tran.learning_rate=1: must begin with one of train., orch. to say which file it "
        "changes; did you mean `train`?"
    )
