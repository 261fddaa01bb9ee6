"""Mappings of JSON values as protobuf Structs, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.struct_pb2 import Struct

from surogate.errors import InvalidInputError


def to_struct(values: Mapping[str, Any]) -> Struct:
    """The mapping as it travels. Raises InvalidInputError for values that JSON does not have."""
    try:
        return ParseDict(dict(values), Struct())
    except (ParseError, TypeError, ValueError) as error:
        raise InvalidInputError(f"the configuration has a value that JSON does not have: {error}") from error


def from_struct(message: Struct) -> dict[str, Any]:
    """The mapping in a Struct. A Struct knows doubles only: whole numbers come back as integers."""
    return {key: _whole(value) for key, value in MessageToDict(message).items()}


def _whole(value: Any) -> Any:
    match value:
        case dict():
            return {key: _whole(item) for key, item in value.items()}
        case list():
            return [_whole(item) for item in value]
        case float() if value.is_integer():
            return int(value)
    return value
