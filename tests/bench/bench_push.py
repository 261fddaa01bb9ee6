"""Seconds and GB/s of a weight push, as a ratio to a raw TCP copy of the same bytes on loopback.

`python -m tests.bench.bench_push [--json FILE]`. Transports and the TCP copy take turns; each figure is the median of
its rounds. A push counts from the first call to the last commit: memory reserved, bytes moved, checksums verified.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path

from surogate.process import start_service
from surogate.rpc.channel import ClientSecurity
from surogate.v1 import common_pb2, weights_pb2
from surogate.weights.manifest import write_image
from surogate.weights.memory import SHM, MemoryDirectory
from surogate.weights.push import push

MB = 1_000_000
SIZES = (10 * MB, 100 * MB, 1000 * MB)
TENSORS = 50
_BLOCK = 1 << 20


def tcp_seconds(data: memoryview) -> float:
    """Seconds to copy `data` through one loopback connection, from the first send to the receiver's answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = threading.Thread(target=_receive, args=(listener, len(data)))
        receiver.start()
        with socket.create_connection(listener.getsockname()) as sender:
            start = time.perf_counter()
            sender.sendall(data)
            sender.recv(1)
            seconds = time.perf_counter() - start
        receiver.join()
    return seconds


def _receive(listener: socket.socket, length: int) -> None:
    connection, _ = listener.accept()
    buffer = bytearray(_BLOCK)
    with connection:
        while length:
            length -= connection.recv_into(buffer)
        connection.send(b"x")


def random_image(path: Path, num_bytes: int) -> weights_pb2.WeightManifest:
    """An image of about `num_bytes` in bfloat16 tensors of equal size, with version 1."""
    elements = num_bytes // TENSORS // 2
    data = os.urandom(_BLOCK) * (2 * elements // _BLOCK + 1)
    tensors = [
        (f"layers.{index}.weight", common_pb2.DTYPE_BF16, (elements,), memoryview(data)[: 2 * elements])
        for index in range(TENSORS)
    ]
    return write_image(path, tensors, version=1, kind=weights_pb2.WEIGHT_KIND_FULL)


async def measure(target: str, num_bytes: int, rounds: int, versions: list[int]) -> dict[str, float]:
    """Medians for one size: seconds of each transport and of the TCP copy."""
    memory = MemoryDirectory(SHM)
    image = memory.path / "image.safetensors"
    manifest = await asyncio.to_thread(random_image, image, num_bytes)
    data = memoryview(image.read_bytes())
    seconds: dict[str, list[float]] = {"tcp": [], "grpc": [], "shared_memory": []}
    try:
        for _ in range(rounds):
            seconds["tcp"].append(await asyncio.to_thread(tcp_seconds, data))
            for transport in ("grpc", "shared_memory"):
                versions[0] += 1
                manifest.version = versions[0]
                shared = transport == "shared_memory"
                report = await push(image, manifest, [target], ClientSecurity(), shared_memory=shared)
                assert report.replicas[0].transport == transport and not report.errors
                seconds[transport].append(report.seconds)
    finally:
        memory.close()
    return {name: statistics.median(times) for name, times in seconds.items()}


async def run(sizes: tuple[int, ...], rounds: int) -> list[dict[str, float]]:
    """One row per size: bytes, seconds of each transport, and ratios to TCP (1 = as fast)."""
    rows = []
    versions = [0]
    with tempfile.TemporaryDirectory() as folder:
        replica = await start_service("tests.bench.replica", log_file=Path(folder) / "replica.log")
        try:
            for size in sizes:
                await measure(replica.address, size, 1, versions)  # connections, imports and memory warm
                seconds = await measure(replica.address, size, rounds, versions)
                rows.append(_row(size, seconds))
                print(_line(rows[-1]), flush=True)
        finally:
            await replica.stop()
    return rows


def _row(size: int, seconds: dict[str, float]) -> dict[str, float]:
    row: dict[str, float] = {"bytes": size}
    for name, value in seconds.items():
        row[f"{name}_seconds"] = value
        row[f"{name}_ratio"] = seconds["tcp"] / value
    return row


def _line(row: dict[str, float]) -> str:
    parts = [f"{row['bytes'] / MB:6.0f} MB"]
    for name in ("tcp", "grpc", "shared_memory"):
        rate = row["bytes"] / row[f"{name}_seconds"] / 1e9
        parts.append(f"{name} {row[f'{name}_seconds']:.4f} s {rate:5.2f} GB/s ratio {row[f'{name}_ratio']:.2f}")
    return "   ".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per size (default 7)")
    parser.add_argument("--sizes-mb", type=int, nargs="+", default=[size // MB for size in SIZES])
    options = parser.parse_args(argv)
    rows = asyncio.run(run(tuple(size * MB for size in options.sizes_mb), options.rounds))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
