"""The JSON value that a completion answers with, and whether a schema likes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, NoReturn

import jsonschema
import referencing
import referencing.exceptions
from jsonschema import validators

from reward_svc.rewards.patterns import find

_FENCE = re.compile(r"```[a-zA-Z]*[ \t]*\n(.*?)```", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
MAX_DEPTH = 100

# Without a way to retrieve them, references to other documents are errors: no schema makes this service fetch a page.
_NOTHING_REMOTE: referencing.Registry[Any] = referencing.Registry()


extend: Any = validators.extend  # its package leaves it without types


def read_value(text: str) -> Any:
    """The value of the last fenced block, else of the whole text. Raises ValueError for what is not strict JSON."""
    fenced = _FENCE.findall(text)
    value = fenced[-1] if fenced else text
    # Counted before it is parsed: a RecursionError within a C function leaves Python 3.11's own count wrong.
    if _depth(value) > MAX_DEPTH:
        raise ValueError("nested too deeply")
    return json.loads(value, parse_constant=_refuse)


def validator_of(schema: Any) -> Any:
    """A validator. Raises ValueError for a schema that is none."""
    if not isinstance(schema, Mapping | bool):
        raise ValueError("a schema is an object")
    base: Any = validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        base.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"is no JSON Schema: {error.message}") from error
    bounded = extend(base, {"pattern": _pattern, "patternProperties": _pattern_properties})
    return bounded(schema, registry=_NOTHING_REMOTE)


def first_error(validator: Any, value: Any) -> str | None:
    """What is wrong with a value, or None. Raises ValueError for a schema that refers to what is not there."""
    try:
        error = next(validator.iter_errors(value), None)
    except referencing.exceptions.Unresolvable as missing:
        raise ValueError(f"refers to {missing.ref!r}, which is not in the schema") from missing
    except RecursionError:
        return "nested too deeply"
    return None if error is None else f"{error.json_path}: {error.message}"[:300]


def _depth(text: str) -> int:
    steps = (1 if char in "[{" else -1 for char in _STRING.sub("", text) if char in "[{]}")
    return max(accumulate(steps), default=0)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    if validator.is_type(instance, "string") and find(pattern, instance) is None:
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(
    validator: Any, properties: Mapping[str, Any], instance: Any, schema: Any
) -> Iterator[jsonschema.ValidationError]:
    if not validator.is_type(instance, "object"):
        return
    for pattern, subschema in properties.items():
        for name, value in instance.items():
            if find(pattern, name) is not None:
                yield from validator.descend(value, subschema, path=name, schema_path=pattern)
