"""Validates `env[].args` against an environment's schema, naming the key that is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from surogate.errors import InvalidInputError, Violation

ModelT = TypeVar("ModelT", bound=BaseModel)

PREFIX = "env[].args"


def parse_arguments(model: type[ModelT], args: Mapping[str, Any]) -> ModelT:
    """Returns the validated arguments. Raises InvalidInputError with one violation per wrong key."""
    try:
        return model.model_validate(dict(args))
    except ValidationError as error:
        violations = [_violation(model, dict(item)) for item in error.errors(include_url=False)]
    raise InvalidInputError("\n".join(map(str, violations)), violations=violations)


def bad_argument(key: str, description: str) -> InvalidInputError:
    """The error for one wrong argument, for checks that a schema cannot make."""
    violation = Violation(f"{PREFIX}.{key}", description)
    return InvalidInputError(str(violation), violations=[violation])


def _violation(model: type[BaseModel], item: dict[str, Any]) -> Violation:
    location = ".".join(map(str, item["loc"]))
    field = f"{PREFIX}.{location}" if location else PREFIX
    if item["type"] == "extra_forbidden":
        return Violation(field, _unknown(location, list(model.model_fields)))
    if item["type"] == "missing":
        return Violation(field, "is required")
    message = str(item["msg"]).removeprefix("Value error, ")
    return Violation(field, f"{message} (got {item['input']!r})" if location else message)


def _unknown(key: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known arguments: {', '.join(sorted(known))}"
    return f"unknown argument; {hint}"
