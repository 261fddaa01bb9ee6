"""Manifests: made from an image, or while one is written, and checked before anything is done with them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import xxhash
from google.protobuf.message import Message

from surogate.errors import InvalidInputError, Violation
from surogate.v1 import common_pb2, weights_pb2
from surogate.weights.image import DTYPE_BYTES, TensorEntry, make_header, read_header, size_of
from surogate.weights.verify import checksums

Buffer: TypeAlias = bytes | bytearray | memoryview
MAX_TENSORS = 200_000
_MAX_NAME = 512
_MAX_VIOLATIONS = 10


def write_image(
    path: Path,
    tensors: Sequence[tuple[str, common_pb2.Dtype.ValueType, Sequence[int], Buffer]],
    *,
    version: int,
    kind: weights_pb2.WeightKind.ValueType,
    base_version: int = 0,
    adapter_config_json: str = "",
) -> weights_pb2.WeightManifest:
    """Writes tensors (name, element type, shape, bytes) as an image and returns its manifest, in one pass.

    Raises InvalidInputError for bytes that do not make the shape, OSError when the file cannot be written.
    """
    header, entries = make_header((name, dtype, shape) for name, dtype, shape, _ in tensors)
    sums = []
    with path.open("wb", buffering=0) as file:
        file.write(header)
        for entry, (*_, data) in zip(entries, tensors, strict=True):
            view = memoryview(data).cast("B") if entry.num_bytes else memoryview(b"")
            if view.nbytes != entry.num_bytes:
                raise InvalidInputError(f"tensor {entry.name!r}: {view.nbytes} bytes given, {entry.num_bytes} expected")
            sums.append(xxhash.xxh3_64_intdigest(view))
            _write_all(file.fileno(), view)
    return _manifest(path, entries, sums, version, kind, base_version, adapter_config_json)


def build_manifest(
    path: Path,
    *,
    version: int,
    kind: weights_pb2.WeightKind.ValueType,
    base_version: int = 0,
    adapter_config_json: str = "",
) -> weights_pb2.WeightManifest:
    """The manifest of a safetensors file, its bytes read once. Raises DataLossError if it is not a whole one."""
    entries = read_header(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sums = checksums(fd, [(entry.offset, entry.num_bytes) for entry in entries])
    finally:
        os.close(fd)
    return _manifest(path, entries, sums, version, kind, base_version, adapter_config_json)


def check_manifest(manifest: weights_pb2.WeightManifest, max_bytes: int | None = None) -> None:
    """Raises InvalidInputError that names the tensors and fields that are wrong in themselves, for any model."""
    wrong = [*_wrong_fields(manifest, max_bytes)]
    if not wrong:
        wrong = [*_wrong_tensors(manifest)]
    if wrong:
        shown = wrong[:_MAX_VIOLATIONS]
        more = f"\nand {len(wrong) - len(shown)} more" if len(wrong) > len(shown) else ""
        raise InvalidInputError("\n".join(map(str, shown)) + more, violations=shown, reason="BAD_MANIFEST")


def fingerprint(manifest: Message) -> bytes:
    """Equal for equal manifests, and 16 bytes long whatever they hold."""
    return xxhash.xxh3_128_digest(manifest.SerializeToString(deterministic=True))


def _manifest(
    path: Path,
    entries: Sequence[TensorEntry],
    sums: Sequence[int],
    version: int,
    kind: weights_pb2.WeightKind.ValueType,
    base_version: int,
    adapter_config_json: str,
) -> weights_pb2.WeightManifest:
    return weights_pb2.WeightManifest(
        version=version,
        base_version=base_version,
        kind=kind,
        num_bytes=path.stat().st_size,
        adapter_config_json=adapter_config_json,
        tensors=[
            weights_pb2.TensorSpec(
                name=entry.name,
                dtype=entry.dtype,
                shape=entry.shape,
                offset=entry.offset,
                num_bytes=entry.num_bytes,
                xxh3=xxh3,
            )
            for entry, xxh3 in zip(entries, sums, strict=True)
        ],
    )


def _wrong_fields(manifest: weights_pb2.WeightManifest, max_bytes: int | None) -> Iterable[Violation]:
    is_delta = manifest.kind == weights_pb2.WEIGHT_KIND_DELTA
    yield from _wrong_version(manifest)
    if manifest.kind == weights_pb2.WEIGHT_KIND_UNSPECIFIED or manifest.kind not in weights_pb2.WeightKind.values():
        yield Violation("manifest.kind", "must be LORA, FULL, DELTA or BASE")
    if is_delta and not 0 <= manifest.base_version < manifest.version:
        yield Violation("manifest.base_version", f"must be below version {manifest.version}")
    if not is_delta and manifest.base_version:
        yield Violation("manifest.base_version", "must be 0 except for DELTA")
    if manifest.num_bytes < 8:
        yield Violation("manifest.num_bytes", "is shorter than an empty image")
    if max_bytes is not None and manifest.num_bytes > max_bytes:
        yield Violation("manifest.num_bytes", f"is {manifest.num_bytes}; this replica takes {max_bytes} at most")
    if not 1 <= len(manifest.tensors) <= MAX_TENSORS:
        yield Violation("manifest.tensors", f"has {len(manifest.tensors)} tensors; 1 to {MAX_TENSORS} are taken")
    if manifest.kind == weights_pb2.WEIGHT_KIND_LORA and not _is_json_object(manifest.adapter_config_json):
        yield Violation("manifest.adapter_config_json", "must be the JSON object of PEFT's adapter_config.json")


def _wrong_version(manifest: weights_pb2.WeightManifest) -> Iterable[Violation]:
    if manifest.kind != weights_pb2.WEIGHT_KIND_BASE:
        if manifest.version < 1:
            yield Violation("manifest.version", f"must be >= 1, is {manifest.version}")
        return
    if manifest.version != 0:
        yield Violation("manifest.version", f"must be 0 for BASE, is {manifest.version}")
    if not manifest.base_id:
        yield Violation("manifest.base_id", "must name the base")


def _wrong_tensors(manifest: weights_pb2.WeightManifest) -> Iterable[Violation]:
    seen: set[str] = set()
    end, last = 8, "the header"
    for spec in sorted(manifest.tensors, key=lambda spec: (spec.offset, spec.num_bytes)):
        problem = _wrong_in_itself(spec)
        if spec.name in seen:
            problem = "is there twice"
        elif problem is None and spec.offset < end:
            problem = f"overlaps {last}"
        elif problem is None and spec.offset + spec.num_bytes > manifest.num_bytes:
            problem = f"ends at byte {spec.offset + spec.num_bytes}; the image has {manifest.num_bytes}"
        if problem is not None:
            yield Violation(_field(spec.name), problem)
            continue
        seen.add(spec.name)
        end, last = max(end, spec.offset + spec.num_bytes), spec.name


def _wrong_in_itself(spec: weights_pb2.TensorSpec) -> str | None:
    if not 1 <= len(spec.name) <= _MAX_NAME:
        return f"names have 1 to {_MAX_NAME} characters"
    if spec.dtype not in DTYPE_BYTES:
        return "has no dtype that is known here"
    if any(size < 0 for size in spec.shape):
        return f"has a negative size in its shape {list(spec.shape)}"
    expected = size_of(spec.dtype, spec.shape)
    if spec.num_bytes != expected:
        return f"num_bytes is {spec.num_bytes}; its dtype and shape {list(spec.shape)} make {expected}"
    return None


def _field(name: str) -> str:
    return f"tensor {name[:_MAX_NAME]!r}"


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _write_all(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]
