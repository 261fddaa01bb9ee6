"""Weight images of random bytes, and a replica that takes them, for tests of the push."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from surogate.rpc.server import RpcServer
from surogate.v1 import common_pb2, weights_pb2, weights_pb2_grpc
from surogate.weights.manifest import write_image
from surogate.weights.servicer import SERVICE, WeightUpdateServicer
from surogate.weights.staging import Check, StagedUpdate, Staging


def make_image(
    path: Path,
    *,
    version: int = 1,
    sizes: tuple[int, ...] = (64, 1000, 3),
    kind: weights_pb2.WeightKind.ValueType = weights_pb2.WEIGHT_KIND_FULL,
    base_version: int = 0,
    seed: int = 0,
) -> weights_pb2.WeightManifest:
    """Writes an image of float32 vectors `layer.<i>` of the given lengths."""
    source = random.Random(seed)
    tensors = [
        (f"layer.{index}", common_pb2.DTYPE_F32, (size,), source.randbytes(4 * size))
        for index, size in enumerate(sizes)
    ]
    config = json.dumps({"r": 4, "lora_alpha": 8}) if kind == weights_pb2.WEIGHT_KIND_LORA else ""
    return write_image(path, tensors, version=version, kind=kind, base_version=base_version, adapter_config_json=config)


class FakeReplica:
    """Keeps the bytes that were committed. `fail` makes commits raise; `gate` makes them wait."""

    def __init__(self, root: Path, *, check: Check | None = None, ttl: float = 60.0) -> None:
        self.staging = Staging(root=root, ttl=ttl, check=check)
        self.served: bytes | None = None
        self.commits = 0
        self.fail: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.swapping = asyncio.Event()

    def register(self, server: RpcServer) -> None:
        servicer = WeightUpdateServicer(self.staging, self.commit)
        server.add(weights_pb2_grpc.add_WeightUpdateServiceServicer_to_server, servicer, SERVICE)

    async def commit(self, update: StagedUpdate) -> timedelta:
        self.commits += 1
        self.swapping.set()
        await self.gate.wait()
        if self.fail is not None:
            raise self.fail
        self.served = update.path.read_bytes()
        return timedelta(milliseconds=5)


@contextmanager
def replica(root: Path, **options: object) -> Iterator[FakeReplica]:
    """A FakeReplica whose files are removed at the end."""
    made = FakeReplica(root, **options)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.staging.close()
