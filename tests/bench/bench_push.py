"""Seconds and GB/s of a weight push, as a ratio to a raw TCP copy of the same bytes on loopback.

The replica is a process that takes weights and throws them away: memory reserved, bytes moved, checksums verified and
the commit answered, from the first call to the last. What a commit into vLLM takes is `bench_weights`.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path

from surogate.process import start_service
from surogate.rpc.channel import ClientSecurity
from surogate.v1 import common_pb2, weights_pb2
from surogate.weights.manifest import write_image
from surogate.weights.memory import SHM, MemoryDirectory
from surogate.weights.push import push
from tests.bench.table import Cell, Options, Table
from tests.bench.tcp import tcp_seconds

AIM = 0.25
"""Speed of a push over that of the TCP copy."""

MB = 1_000_000
TENSORS = 50
_BLOCK = 1 << 20


async def run(options: Options) -> Table:
    """A row per size and transport; the copy and the transports take turns."""
    sizes = (1,) if options.quick else (10, 100, 1000)
    rounds = options.rounds or (1 if options.quick else 7)
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory() as folder:
        replica = await start_service("tests.bench.replica", log_file=Path(folder) / "replica.log")
        try:
            versions = count(1)
            for size in sizes:
                rows += await _measured(replica.address, size * MB, rounds, lambda: next(versions))
        finally:
            await replica.stop()
    return Table(("MB", "transport", "seconds", "GB/s", "TCP seconds", "ratio to TCP", "aim"), rows)


async def _measured(target: str, num_bytes: int, rounds: int, version: Callable[[], int]) -> list[list[Cell]]:
    memory = MemoryDirectory(SHM)
    try:
        image = memory.path / "image.safetensors"
        manifest = await asyncio.to_thread(random_image, image, num_bytes)
        data = memoryview(image.read_bytes())
        tcp: list[float] = []
        pushes: dict[str, list[float]] = {"shared_memory": [], "grpc": []}
        for index in range(rounds + 1):
            copied = await asyncio.to_thread(tcp_seconds, data)
            pushed = {name: await _push(image, manifest, target, name, version()) for name in pushes}
            if index:  # the first round warms connections and memory
                tcp.append(copied)
                for name, seconds in pushed.items():
                    pushes[name].append(seconds)
    finally:
        memory.close()
    return [_row(name, manifest.num_bytes, seconds, tcp) for name, seconds in pushes.items()]


async def _push(image: Path, manifest: weights_pb2.WeightManifest, target: str, transport: str, version: int) -> float:
    manifest.version = version
    report = await push(image, manifest, [target], ClientSecurity(), shared_memory=transport == "shared_memory")
    assert report.replicas[0].transport == transport and not report.errors
    return report.seconds


def _row(transport: str, num_bytes: int, seconds: list[float], tcp: list[float]) -> list[Cell]:
    typical = statistics.median(seconds)
    ratio = statistics.median(copied / pushed for copied, pushed in zip(tcp, seconds, strict=True))
    return [round(num_bytes / MB), transport, typical, num_bytes / typical / 1e9, statistics.median(tcp), ratio, AIM]


def random_image(path: Path, num_bytes: int) -> weights_pb2.WeightManifest:
    """An image of about `num_bytes` in bfloat16 tensors of equal size."""
    elements = num_bytes // TENSORS // 2
    data = os.urandom(_BLOCK) * (2 * elements // _BLOCK + 1)
    tensors = [
        (f"layers.{index}.weight", common_pb2.DTYPE_BF16, (elements,), memoryview(data)[: 2 * elements])
        for index in range(TENSORS)
    ]
    return write_image(path, tensors, version=1, kind=weights_pb2.WEIGHT_KIND_FULL)
