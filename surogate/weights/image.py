"""Images in the safetensors format: reading and writing their headers without torch.

An image is 8 bytes of header length (little endian), the header as JSON, and the tensors' bytes one after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surogate.errors import DataLossError, InvalidInputError
from surogate.v1 import common_pb2

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

DTYPE_BYTES: Mapping[common_pb2.Dtype.ValueType, int] = {
    common_pb2.DTYPE_F32: 4,
    common_pb2.DTYPE_F16: 2,
    common_pb2.DTYPE_BF16: 2,
    common_pb2.DTYPE_I64: 8,
    common_pb2.DTYPE_I32: 4,
    common_pb2.DTYPE_U8: 1,
    common_pb2.DTYPE_F8_E4M3: 1,
    common_pb2.DTYPE_F8_E5M2: 1,
    common_pb2.DTYPE_BOOL: 1,
}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in an image: its name, element type, shape, and first byte and length within the whole image."""

    name: str
    dtype: common_pb2.Dtype.ValueType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def dtype_name(dtype: common_pb2.Dtype.ValueType) -> str:
    """The format's name of an element type: `BF16`."""
    return common_pb2.Dtype.Name(dtype).removeprefix("DTYPE_")


def dtype_of(name: str) -> common_pb2.Dtype.ValueType:
    """The element type of the format's name. Raises InvalidInputError for one that the contract does not have."""
    try:
        return common_pb2.Dtype.Value(f"DTYPE_{name}")
    except ValueError as error:
        known = ", ".join(dtype_name(dtype) for dtype in DTYPE_BYTES)
        raise InvalidInputError(f"element type {name!r} cannot be pushed; {known} can") from error


def size_of(dtype: common_pb2.Dtype.ValueType, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return DTYPE_BYTES[dtype] * math.prod(shape)


def make_header(
    tensors: Iterable[tuple[str, common_pb2.Dtype.ValueType, Sequence[int]]],
) -> tuple[bytes, list[TensorEntry]]:
    """The header of an image that holds the tensors in this order, and where each of them will be.

    The first tensor starts at a multiple of 8 bytes, so that the file can be mapped.
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    laid_out: list[tuple[str, common_pb2.Dtype.ValueType, tuple[int, ...], int, int]] = []
    for name, dtype, shape in tensors:
        size = size_of(dtype, shape)
        fields[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [begin, begin + size]}
        laid_out.append((name, dtype, tuple(shape), begin, size))
        begin += size
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [TensorEntry(name, dtype, shape, len(header) + b, size) for name, dtype, shape, b, size in laid_out]


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of an image, in the order of their bytes. Raises DataLossError if it is not a whole image."""
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or length > min(total - 8, MAX_HEADER_BYTES):
            raise DataLossError("the image has no safetensors header", reason="BAD_HEADER")
        text = file.read(length)
    return parse_header(text, total)


def parse_header(text: bytes, total: int) -> list[TensorEntry]:
    """As `read_header`, of the JSON text; `total` is the length of the whole image."""
    start = 8 + len(text)
    try:
        fields = json.loads(text)
        entries = [_entry(name, value, start) for name, value in fields.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataLossError(f"the image's safetensors header cannot be read: {error}", reason="BAD_HEADER") from error
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    position = start
    for entry in entries:
        if entry.offset != position:
            raise DataLossError(
                f"tensor {entry.name!r}: its bytes do not follow the last tensor's", reason="BAD_HEADER"
            )
        position += entry.num_bytes
    if position != total:
        raise DataLossError(f"the image has {total} bytes, its header tells of {position}", reason="BAD_HEADER")
    return entries


def _entry(name: str, value: Mapping[str, Any], start: int) -> TensorEntry:
    begin, end = value["data_offsets"]
    dtype, shape = dtype_of(value["dtype"]), tuple(int(size) for size in value["shape"])
    if end - begin != size_of(dtype, shape):
        raise DataLossError(f"tensor {name!r}: {end - begin} bytes do not make {value['dtype']} {list(shape)}")
    return TensorEntry(name, dtype, shape, start + begin, end - begin)
