"""Checking an image against its manifest: the header says the same, and every tensor's checksum is right."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import xxhash

from surogate.errors import DataLossError
from surogate.v1 import weights_pb2
from surogate.weights.image import MAX_HEADER_BYTES, TensorEntry, dtype_name, parse_header

_BLOCK = 512 << 10
"""Read at once: small enough to stay in the cache between the copy and the hash."""
_ALONE_BYTES = 4 << 20
_THREADS = min(4, os.cpu_count() or 1)
Span = tuple[int, int]
"""Offset and length in bytes."""


class ChecksumError(DataLossError):
    """Tensors whose bytes are not what the manifest promised; `spans` says where they are."""

    reason = "CHECKSUM"

    def __init__(self, message: str, spans: Sequence[Span] = ()) -> None:
        super().__init__(message)
        self.spans = tuple(spans)


def checksums(fd: int, spans: Sequence[Span]) -> list[int]:
    """XXH3-64 of each span of a file, computed in threads that read it side by side. Raises DataLossError at its end.

    It reads instead of mapping: page faults of a fresh mapping cost several times the hash.
    """
    sums = [0] * len(spans)
    order = sorted(range(len(spans)), key=lambda index: -spans[index][1])

    def run(mine: Sequence[int]) -> None:
        buffer = bytearray(_BLOCK)
        for index in mine:
            sums[index] = _checksum(fd, *spans[index], buffer)

    if sum(length for _, length in spans) <= _ALONE_BYTES:
        run(order)
        return sums
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="xxh3") as pool:
        list(pool.map(run, [order[start::_THREADS] for start in range(_THREADS)]))
    return sums


def verify_image(fd: int, manifest: weights_pb2.WeightManifest) -> None:
    """Raises DataLossError if header and manifest differ, ChecksumError naming tensors whose bytes are wrong.

    Reads the whole file: seconds for large images, so not for the event loop.
    """
    entries = {entry.name: entry for entry in _header(fd, manifest.num_bytes)}
    for spec in manifest.tensors:
        _compare(spec, entries.pop(spec.name, None))
    if entries:
        raise DataLossError(f"the image holds {sorted(entries)[0]!r}, which the manifest lacks", reason="BAD_HEADER")
    found = checksums(fd, [(spec.offset, spec.num_bytes) for spec in manifest.tensors])
    wrong = [spec for spec, xxh3 in zip(manifest.tensors, found, strict=True) if spec.xxh3 != xxh3]
    if wrong:
        names = ", ".join(repr(spec.name) for spec in wrong[:5]) + (f" and {len(wrong) - 5} more" if wrong[5:] else "")
        message = f"wrong checksum of {len(wrong)} of {len(manifest.tensors)} tensors: {names}"
        raise ChecksumError(message, [(spec.offset, spec.num_bytes) for spec in wrong])


def _header(fd: int, total: int) -> list[TensorEntry]:
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if length > min(total - 8, MAX_HEADER_BYTES):
        raise DataLossError("the image has no safetensors header", reason="BAD_HEADER")
    return parse_header(os.pread(fd, length, 8), total)


def _compare(spec: weights_pb2.TensorSpec, entry: TensorEntry | None) -> None:
    if entry is None:
        raise DataLossError(f"the image lacks {spec.name!r}, which the manifest holds", reason="BAD_HEADER")
    told = (spec.dtype, tuple(spec.shape), spec.offset, spec.num_bytes)
    if told != (entry.dtype, entry.shape, entry.offset, entry.num_bytes):
        raise DataLossError(
            f"tensor {spec.name!r}: the manifest says {dtype_name(spec.dtype)} {list(spec.shape)} "
            f"at byte {spec.offset}, the image's header {dtype_name(entry.dtype)} {list(entry.shape)} "
            f"at byte {entry.offset}",
            reason="BAD_HEADER",
        )


def _checksum(fd: int, offset: int, length: int, buffer: bytearray) -> int:
    state = xxhash.xxh3_64()
    view = memoryview(buffer)
    end = offset + length
    while offset < end:
        count = os.preadv(fd, [view[: min(len(view), end - offset)]], offset)
        if count == 0:
            raise DataLossError(f"the image ends at byte {offset}; {end} were promised", reason="TRUNCATED")
        state.update(view[:count])
        offset += count
    return state.intdigest()
