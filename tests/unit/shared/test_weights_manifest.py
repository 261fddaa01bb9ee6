"""Images and manifests: what safetensors writes we read, what we write it reads, and what is wrong is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surogate.errors import DataLossError, InvalidInputError
from surogate.v1 import common_pb2, weights_pb2
from surogate.weights.image import read_header
from surogate.weights.manifest import build_manifest, check_manifest, write_image
from surogate.weights.verify import ChecksumError, verify_image
from tests.helpers.weight_images import make_image

FULL, LORA, DELTA = weights_pb2.WEIGHT_KIND_FULL, weights_pb2.WEIGHT_KIND_LORA, weights_pb2.WEIGHT_KIND_DELTA


def verify(path: Path, manifest: weights_pb2.WeightManifest) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        verify_image(fd, manifest)
    finally:
        os.close(fd)


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = tmp_path / "image.safetensors"
    tensors = [("b", common_pb2.DTYPE_F32, (3, 4), weight.tobytes()), ("a", common_pb2.DTYPE_I64, (), bytes(8))]
    write_image(path, tensors, version=1, kind=FULL)
    loaded = load_file(path)
    np.testing.assert_array_equal(loaded["b"], weight)
    assert loaded["a"].shape == ()


def test_we_read_what_safetensors_writes(tmp_path: Path) -> None:
    path = tmp_path / "image.safetensors"
    save_file({"x": np.ones((2, 3), np.float16), "empty": np.ones((0, 7), np.float32)}, path)
    manifest = build_manifest(path, version=3, kind=FULL)
    assert {spec.name: list(spec.shape) for spec in manifest.tensors} == {"x": [2, 3], "empty": [0, 7]}
    check_manifest(manifest)
    verify(path, manifest)


def test_the_manifest_made_while_writing_is_the_one_made_by_reading(tmp_path: Path) -> None:
    path = tmp_path / "image.safetensors"
    written = make_image(path, version=7, sizes=(5, 0, 2_000_000))
    assert build_manifest(path, version=7, kind=FULL) == written


def test_a_flipped_bit_is_found_and_its_tensor_named(tmp_path: Path) -> None:
    path = tmp_path / "image.safetensors"
    manifest = make_image(path)
    with path.open("r+b") as file:
        file.seek(manifest.tensors[1].offset)
        byte = file.read(1)[0]
        file.seek(manifest.tensors[1].offset)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ChecksumError, match=r"layer\.1") as caught:
        verify(path, manifest)
    assert caught.value.spans == ((manifest.tensors[1].offset, manifest.tensors[1].num_bytes),)


def test_header_and_manifest_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "image.safetensors"
    manifest = make_image(path, sizes=(4, 4))
    manifest.tensors[0].dtype = common_pb2.DTYPE_I32
    with pytest.raises(DataLossError, match=r"layer\.0"):
        verify(path, manifest)
    del manifest.tensors[0]
    with pytest.raises(DataLossError, match=r"layer\.0.*lacks"):
        verify(path, manifest)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 64, (2).to_bytes(8, "little") + b"[]"])
def test_what_is_no_image_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataLossError):
        read_header(path)


def rename(manifest: weights_pb2.WeightManifest) -> None:
    manifest.tensors[1].name = "layer.0"


def overlap(manifest: weights_pb2.WeightManifest) -> None:
    manifest.tensors[1].offset -= 4


def reshape(manifest: weights_pb2.WeightManifest) -> None:
    manifest.tensors[1].shape[0] += 1


def outside(manifest: weights_pb2.WeightManifest) -> None:
    manifest.tensors[-1].offset += 8


def negative(manifest: weights_pb2.WeightManifest) -> None:
    manifest.tensors[0].shape[:] = [-64, -1]


def untyped(manifest: weights_pb2.WeightManifest) -> None:
    manifest.tensors[0].dtype = common_pb2.DTYPE_UNSPECIFIED


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rename, r"'layer\.0': is there twice"),
        (overlap, r"'layer\.1': overlaps layer\.0"),
        (reshape, r"'layer\.1': num_bytes is 4000.*make 4004"),
        (outside, r"'layer\.2': ends at byte"),
        (negative, r"'layer\.0': has a negative size"),
        (untyped, r"'layer\.0': has no dtype"),
    ],
)
def test_a_wrong_tensor_is_named(
    tmp_path: Path, spoil: Callable[[weights_pb2.WeightManifest], None], message: str
) -> None:
    manifest = make_image(tmp_path / "image.safetensors")
    spoil(manifest)
    with pytest.raises(InvalidInputError, match=message) as caught:
        check_manifest(manifest)
    assert caught.value.violations


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version": 0}, "manifest.version"),
        ({"kind": weights_pb2.WEIGHT_KIND_UNSPECIFIED}, "manifest.kind"),
        ({"base_version": 1}, "manifest.base_version"),
        ({"kind": DELTA, "base_version": 5}, "manifest.base_version"),
        ({"num_bytes": 10**12}, "manifest.num_bytes"),
        ({"kind": LORA, "adapter_config_json": "[]"}, "manifest.adapter_config_json"),
        ({"tensors": []}, "manifest.tensors"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, object], field: str) -> None:
    manifest = make_image(tmp_path / "image.safetensors", version=5)
    for name, value in change.items():
        if name == "tensors":
            manifest.ClearField("tensors")
        else:
            setattr(manifest, name, value)
    with pytest.raises(InvalidInputError) as caught:
        check_manifest(manifest, max_bytes=10**9)
    assert [violation.field for violation in caught.value.violations] == [field]
