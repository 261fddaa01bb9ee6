"""Configuration models as structural schemas, which is what a CustomResourceDefinition may have.

The API server checks types and ranges; keys that it does not know are kept, so that the orchestrator can say which key
was meant. A value that a model takes in several forms has no type here. Defaults are not written: the API server would
put them into each resource, and what was left unset could not be told from what was set.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from surogate.config.base import number_of

Schema = dict[str, Any]

ANYTHING: Schema = {"x-kubernetes-preserve-unknown-fields": True}
"""Whatever YAML can say."""

_TYPES: Mapping[Any, Schema] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
}
_BOUNDS = {annotated_types.Ge: "ge", annotated_types.Gt: "gt", annotated_types.Le: "le", annotated_types.Lt: "lt"}


def schema_of(model: type[BaseModel]) -> Schema:
    """The schema of a block of configuration."""
    properties = {
        name: _described(field, _schema(field.annotation, field.metadata)) for name, field in model.model_fields.items()
    }
    # No key is required here: another file of the job, or another name of the key, may have it.
    return {"type": "object", **ANYTHING, "properties": properties}


def _described(field: FieldInfo, schema: Schema) -> Schema:
    text = " ".join((field.description or "").split())
    return {**schema, "description": text} if text else schema


def _schema(annotation: Any, metadata: Sequence[Any] = ()) -> Schema:
    if any(isinstance(item, BeforeValidator) and item.func is not number_of for item in metadata):
        return dict(ANYTHING)  # it takes more forms than the type says
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [item for extra in args[1:] for item in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return _schema(args[0], [*inner, *metadata])
    if origin in (Union, types.UnionType):
        return _union([item for item in args if item is not type(None)], type(None) in args, metadata)
    if origin is Literal:
        return {"type": "string", "enum": list(args)} if all(isinstance(item, str) for item in args) else dict(ANYTHING)
    if origin is list:
        return {"type": "array", "items": _schema(args[0])}
    if origin is dict:
        value = _schema(args[1])
        return {"type": "object", **({"additionalProperties": value} if value != ANYTHING else ANYTHING)}
    if annotation in _TYPES:
        return {**_TYPES[annotation], **_bounds(metadata)}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and "root" not in annotation.model_fields:
        return schema_of(annotation)
    return dict(ANYTHING)


def _union(kinds: Sequence[Any], nullable: bool, metadata: Sequence[Any]) -> Schema:
    schema = _schema(kinds[0], metadata) if len(kinds) == 1 else dict(ANYTHING)
    if not nullable or "type" not in schema:
        return schema
    return {**{key: value for key, value in schema.items() if key != "enum"}, "nullable": True}


def _bounds(metadata: Sequence[Any]) -> Schema:
    """Ranges, in the words of OpenAPI 3.0: an exclusive bound is a flag beside the bound."""
    found: Schema = {}
    for item in metadata:
        for kind, name in _BOUNDS.items():
            if isinstance(item, kind):
                side = "minimum" if name.startswith("g") else "maximum"
                found[side] = getattr(item, name)
                if name in {"gt", "lt"}:
                    found[f"exclusive{side.capitalize()}"] = True
        if isinstance(item, annotated_types.MinLen):
            found["minLength"] = item.min_length
    return found
