"""What pydantic says of a configuration, in words for the person who wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from surogate.config.base import EMPTY, nearest, shown
from surogate.errors import Violation

TAGS = frozenset(
    "text instruction conversation auto ipo aipo dppo grpo bnpo dr_grpo dapo cispo gspo".split()  # noqa: SIM905
)
"""Values of `type` that pydantic puts into the place of an error within a tagged union."""

MAX_WHOLE = 2**53
"""Largest whole number that a `google.protobuf.Struct` carries exactly."""

MAX_DEPTH = 24
"""Mappings and lists within each other. Parsers of protobuf take messages that are nested 100 deep, of which each of
these is up to three, and a job is sent within others: deeper ones could be stored and not listed."""

EXPECTED = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string (put it in quotes)",
    "list_type": "must be a list",
    "dict_type": "must be a mapping (lines of `key: value`)",
    "model_type": "must be a mapping (lines of `key: value`)",
    "model_attributes_type": "must be a mapping (lines of `key: value`)",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
    "string_too_short": "must not be empty",
    "too_short": "must have at least {min_length} item(s)",
}
"""What was expected, by pydantic's type of error."""


def violations_of(error: ValidationError, prefix: str = "") -> list[Violation]:
    """The violations of a configuration: keys as `prefix.a.0.b`, one for each error."""
    return [Violation(join(prefix, *key_path(item["loc"])), describe(item)) for item in error.errors(include_url=False)]


def unfit(data: Any, key: str = "", depth: int = 0) -> list[Violation]:
    """Values that no message, path or file can hold, wherever they are in the data; to be refused before anything."""
    if depth > MAX_DEPTH:
        return [Violation(key, f"is nested more than {MAX_DEPTH} deep")]
    if isinstance(data, dict):
        return [item for name, value in data.items() for item in unfit(value, join(key, name), depth + 1)]
    if isinstance(data, list):
        return [item for index, value in enumerate(data) for item in unfit(value, join(key, index), depth + 1)]
    if isinstance(data, int) and abs(data) > MAX_WHOLE:
        return [Violation(key, f"must be a number between -{MAX_WHOLE} and {MAX_WHOLE}, got {shown(data)}")]
    if isinstance(data, float) and not math.isfinite(data):
        return [Violation(key, f"must be a finite number, got {data}")]
    if isinstance(data, str) and "\0" in data:
        return [Violation(key, f"must not contain the character U+0000, got {shown(data)}")]
    if isinstance(data, str) and any("\ud800" <= character <= "\udfff" for character in data):
        return [Violation(key, f"must be text, which half of a surrogate pair is not, got {shown(data)}")]
    return []


def key_path(loc: Iterable[str | int]) -> list[str | int]:
    """The place of an error without the tags of unions."""
    path: list[str | int] = []
    for part in loc:
        after_tagged = not path or isinstance(path[-1], int) or path[-1] == "loss"
        if not (part in TAGS and after_tagged):
            path.append(part)
    return path


def join(*parts: str | int) -> str:
    """A dotted key of its parts; empty ones are left out."""
    return ".".join(str(part) for part in parts if part != "")


def describe(error: Any) -> str:
    """One error in a sentence that says what was expected and what there was."""
    kind, value, context = error["type"], error["input"], error.get("ctx") or {}
    if kind == "surogate":
        return str(error["msg"])
    if kind == "missing":
        return "is required"
    if kind == "union_tag_not_found":
        return "`type` is required: text, instruction, conversation or auto"
    if kind == "union_tag_invalid":
        return _choice(context["expected_tags"], context["tag"], "`type` must be one of")
    if value is None:
        return EMPTY
    if kind == "literal_error":
        return _choice(context["expected"], value, "must be one of")
    if kind in EXPECTED:
        return f"{EXPECTED[kind].format(**context)}, got {shown(value)}"
    return f"{error['msg']}, got {shown(value)}"


def _choice(expected: str, value: object, lead: str) -> str:
    choices = [choice.strip().strip("'") for choice in expected.replace(" or ", ", ").split(",")]
    hint = nearest(value, choices) if isinstance(value, str) else ""
    if len(choices) == 1:
        return f"must be {choices[0]}, got {shown(value)}"
    return f"{lead} {', '.join(choices)}; got {shown(value)}{hint}"
