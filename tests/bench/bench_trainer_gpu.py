"""The trainer on one CUDA card, in the settings of others' published figures; on a CPU only whether it works.

Each row is a process of its own (`trainer_case.py`), so that each starts with an empty card.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

from tests.bench.programs import last_line
from tests.bench.table import Cell, Options, Table
from tests.bench.trainer_case import Case

SECONDS = 600.0
"""A row may take this long."""

GRPO = {"kind": "grpo", "sequence": 16_384, "rows": 1, "micro_batches": 4}


@dataclass(frozen=True)
class Row:
    """A case, what others publish for it in tokens a second on an H100, and how many times that is the aim."""

    case: Case
    others: str
    published: float
    aim: float


ROWS = (
    *(
        Row(Case(shape, steps=10 if shape == "0.6B" else 5), "Surogate", published, aim)
        for shape, published, aim in (
            ("0.6B", 53_900, 2.0),
            ("1.7B", 32_800, 1.7),
            ("4B", 15_900, 1.4),
            ("8B", 10_200, 1.3),
        )
    ),
    Row(Case("0.6B", lora=False, sequence=8_192, rows=1, steps=5), "PRIME-RL", 26_000, 1.0),
    Row(Case("0.6B", lora=False, sequence=16_384, rows=1, steps=5), "PRIME-RL", 25_500, 1.0),
    Row(Case("0.6B", **GRPO, steps=5), "PRIME-RL", 13_300, 1.0),
)
QUICK = (
    Row(Case("tiny", sequence=64, steps=1, warm=1), "nobody", 1.0, 1.0),
    Row(Case("tiny", **{**GRPO, "sequence": 64}, steps=1, warm=1), "nobody", 1.0, 1.0),
)


async def run(options: Options) -> Table:
    """All of them, or with `quick` two steps of a tiny model."""
    columns = ("model", "training", "sequence", "batch", "accumulation", "tokens/s", "TFLOP/s", "MFU", "GiB")
    columns += ("first step, s", "published by", "tokens/s there", "ratio", "aim", "device")
    return Table(columns, [await _row(row) for row in (QUICK if options.quick else ROWS)])


async def _row(row: Row) -> list[Cell]:
    case = row.case
    found = await measure(case)
    training = "GRPO, LoRA" if case.kind == "grpo" else "LoRA" if case.lora else "full"
    facts: list[Cell] = [case.shape, training, case.sequence, case.rows, case.micro_batches]
    speed = found["tokens_per_second"]
    measured: list[Cell] = [speed, found["tflops"], found["mfu"], found["memory_gib"], found["first_step_seconds"]]
    return [*facts, *measured, row.others, row.published, speed / row.published, row.aim, found["device"]]


async def measure(case: Case) -> dict[str, Any]:
    """Runs a case in a process of its own and says on stderr what it found."""
    flags = []
    for name, value in asdict(case).items():
        flags += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    line = await last_line("tests.bench.trainer_case", *flags, seconds=SECONDS)
    print(line, file=sys.stderr, flush=True)
    found: dict[str, Any] = json.loads(line)
    return found
