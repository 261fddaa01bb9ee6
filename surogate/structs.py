"""Mappings of JSON values as protobuf Structs, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.struct_pb2 import Struct, Value

from surogate.errors import InvalidInputError

_EXACT = 2**53
"""Up to here every whole number has a double of its own."""


def to_struct(values: Mapping[str, Any]) -> Struct:
    """The mapping as it travels. Raises InvalidInputError for values that JSON does not have."""
    try:
        return ParseDict(dict(values), Struct())
    except (ParseError, TypeError, ValueError) as error:
        raise InvalidInputError(f"the configuration has a value that JSON does not have: {error}") from error


def from_struct(message: Struct) -> dict[str, Any]:
    """The mapping in a Struct. A Struct knows doubles only: whole numbers come back as integers.

    Infinities and NaN, which JSON does not have and a Struct can carry, come back as they are.
    """
    return {key: _plain(value) for key, value in message.fields.items()}


def _plain(value: Value) -> Any:
    match value.WhichOneof("kind"):
        case "struct_value":
            return from_struct(value.struct_value)
        case "list_value":
            return [_plain(item) for item in value.list_value.values]
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() and abs(number) <= _EXACT else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
    return None
