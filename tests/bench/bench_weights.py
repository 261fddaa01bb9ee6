"""A weight push into a replica that serves with vLLM: seconds to the end of the commit, and how long generation paused.

Unlike `bench_push` this counts what the engine does with the weights. A push goes by the transport that it takes on one
host, shared memory; the TCP copy of the same bytes takes turns with it.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from surogate.rpc.channel import ClientSecurity
from surogate.v1 import weights_pb2
from surogate.weights.push import PushReport, push
from tests.bench.table import Cell, Options, Table
from tests.bench.tcp import tcp_seconds
from tests.helpers.inference import TOKEN, adapter_manifest, full_manifest, replica
from tests.helpers.models.tiny import make_tiny_adapter, make_tiny_model

AIM = 0.25
"""Speed of a push over that of the TCP copy."""

RANK = 16
MB = 1_000_000


@dataclass(frozen=True)
class Case:
    """A model in float32; its full weights are pushed, and an adapter for it."""

    layers: int
    hidden: int
    """A multiple of 32."""


CASES = (Case(4, 256), Case(8, 608), Case(24, 1152))
"""About 10 MB, 110 MB and 1 GB."""


async def run(options: Options) -> Table:
    """Two rows for each model: an adapter for it, then its full weights."""
    cases = (Case(2, 64),) if options.quick else CASES
    rows = [row for case in cases for row in await _rows(case, options.rounds or (1 if options.quick else 5))]
    columns = ("pushed", "MB", "seconds", "GB/s", "pause, ms", "TCP seconds", "ratio to TCP", "aim")
    return Table(columns, rows)


async def _rows(case: Case, rounds: int) -> list[list[Cell]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, adapter = folder / "model", folder / "adapter"
        make_tiny_model(model, layers=case.layers, hidden=case.hidden)
        make_tiny_adapter(adapter, model, rank=RANK)
        async with replica(folder, model, "--max-lora-rank", str(RANK)) as served:
            versions = count(1)
            target = served.process.address
            return [  # the adapter first: on replaced weights there is none
                await _row("LoRA adapter", *adapter_manifest(adapter, 1), target, versions, rounds),
                await _row("full weights", *full_manifest(model, 1), target, versions, rounds),
            ]


async def _row(
    what: str,
    manifest: weights_pb2.WeightManifest,
    image: Path,
    target: str,
    versions: Iterator[int],
    rounds: int,
) -> list[Cell]:
    data = memoryview(await asyncio.to_thread(image.read_bytes))
    copies: list[float] = []
    reports: list[PushReport] = []
    for index in range(rounds + 1):
        copied = await asyncio.to_thread(tcp_seconds, data)
        manifest.version = next(versions)
        report = await push(image, manifest, [target], ClientSecurity(token=TOKEN))
        assert not report.errors
        if index:  # the first round warms connections and memory
            copies.append(copied)
            reports.append(report)
    seconds = statistics.median(report.seconds for report in reports)
    pause = statistics.median(report.pause_seconds for report in reports)
    ratio = statistics.median(copied / report.seconds for copied, report in zip(copies, reports, strict=True))
    size = manifest.num_bytes
    return [what, size / MB, seconds, size / seconds / 1e9, 1000 * pause, statistics.median(copies), ratio, AIM]
