"""The JSON value that a completion answers with, and whether a schema likes it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextvars import ContextVar
from itertools import accumulate
from typing import Any, NoReturn, cast

import jsonschema
import referencing
import referencing.exceptions
from jsonschema import validators

from reward_svc.rewards.patterns import find
from surogate.errors import DeadlineError

_FENCE = re.compile(r"```[a-zA-Z]*[ \t]*\n(.*?)```", re.DOTALL)
# Up to its end, or that of the text: where strings that do not end were looked for again from each quotation mark, they
# would cost their length squared.
_STRING = re.compile(r'"(?:[^"\\]+|\\.)*+"?', re.DOTALL)
MAX_DEPTH = 100

DEEP = 20
"""Levels of a value from which on a check that goes too deep is the value's fault, and not the schema's."""

Keyword = Callable[[Any, Any, Any, Any], Iterator[jsonschema.ValidationError] | None]

_ends: ContextVar[tuple[float, float]] = ContextVar("ends")
"""When the check must have ended (monotonic), and the seconds that it had."""

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
    own = {"pattern": _pattern, "patternProperties": _pattern_properties, "uniqueItems": _unique_items}
    bounded = extend(base, {name: _timed(keyword) for name, keyword in {**base.VALIDATORS, **own}.items()})
    return bounded(schema, registry=_NOTHING_REMOTE)


def first_error(validator: Any, value: Any, seconds: float = 1.0) -> str | None:
    """What is wrong with a value, or None. Raises ValueError for a schema that refers to what is not there, and
    DeadlineError after `seconds`: schemas that refer to themselves may take 2ⁿ steps for n levels of a value."""
    _ends.set((time.monotonic() + seconds, seconds))
    try:
        error = next(validator.iter_errors(value), None)
    except OverflowError:
        return "a number is too large"
    except referencing.exceptions.Unresolvable as missing:
        raise ValueError(f"refers to {missing.ref!r}, which is not in the schema") from missing
    except RecursionError as error:
        if _levels(value) < DEEP:
            raise ValueError("refers to itself without end") from error
        return "nested too deeply"
    return None if error is None else f"{error.json_path}: {error.message}"[:300]


def _levels(value: Any) -> int:
    """How deep a value is nested."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_levels, inner), default=0)


def _depth(text: str) -> int:
    steps = (1 if char in "[{" else -1 for char in _STRING.sub("", text) if char in "[{]}")
    return max(accumulate(steps), default=0)


def _timed(keyword: Keyword) -> Keyword:
    def check(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
        _seconds_left()
        yield from keyword(validator, value, instance, schema) or ()

    return check


def _seconds_left() -> float:
    end, seconds = _ends.get()
    left = end - time.monotonic()
    if left <= 0:
        raise DeadlineError(f"checking the value against the schema took longer than {seconds:g} s")
    return left


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    if validator.is_type(instance, "string") and find(pattern, instance, timeout=_seconds_left()) is None:
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(
    validator: Any, properties: Mapping[str, Any], instance: Any, schema: Any
) -> Iterator[jsonschema.ValidationError]:
    if not validator.is_type(instance, "object"):
        return
    for pattern, subschema in properties.items():
        for name, value in instance.items():
            if find(pattern, name, timeout=_seconds_left()) is not None:
                yield from validator.descend(value, subschema, path=name, schema_path=pattern)


def _unique_items(validator: Any, unique: bool, instance: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    # The package compares objects each with each.
    if unique and validator.is_type(instance, "array") and len(set(map(_key, instance))) < len(instance):
        yield jsonschema.ValidationError("it has items that are equal")


def _key(value: Any) -> Hashable:
    """Equal for values that JSON Schema holds equal: 1 and 1.0, but not 1 and true."""
    match value:
        case bool():
            return (bool, value)
        case list():
            return tuple(map(_key, value))
        case dict():
            return frozenset((name, _key(item)) for name, item in value.items())
    return cast("Hashable", value)
