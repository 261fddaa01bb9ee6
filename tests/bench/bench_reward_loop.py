"""Seconds a GRPO step when each reward takes 0 to 5 s at random, against rewards that are there at once.

The orchestrator is the real service; trainer, inference and reward are `tests.bench.delayed`. Inference bounds the
loop, as in real jobs: it generates 4 groups at once, 2 s each, so that the 8 groups of a step take 4 s; training takes
1 s.
"""

from __future__ import annotations

import statistics

from tests.bench.bench_orchestrator import Case, step_seconds
from tests.bench.table import Options, Table

AIM = 1.1
"""Step time to that with instant rewards, where generation runs far enough ahead for scoring to overlap it."""

_MOST_SECONDS = 5.0
_GENERATE, _TRAIN = 2.0, 1.0


async def run(options: Options) -> Table:
    """Seconds a step, the medians over the rounds, each of them two jobs one after the other."""
    scale, steps, levels = (0.01, 5, (1,)) if options.quick else (1.0, 15, (1, 2, 3))
    rows = []
    for level in levels:
        found = [await _pair(level, steps, scale) for _ in range(options.rounds or 1)]
        instant, slow = (statistics.median(values) for values in zip(*found, strict=True))
        aim = AIM if level > 1 else None
        rows.append((level, scale * _MOST_SECONDS, instant, slow, slow / instant, aim))
    return Table(
        ("async level", "slowest reward s", "s/step, instant", "s/step, slow", "ratio", "aim at most"),
        rows,
    )


async def _pair(level: int, steps: int, scale: float) -> tuple[float, float]:
    """Seconds a step with instant and with slow rewards."""
    case = Case(64, 16, async_level=level)
    delays = {"BENCH_GENERATE": str(_GENERATE * scale), "BENCH_TRAIN": str(_TRAIN * scale)}
    instant = await step_seconds(case, steps, "tests.bench.delayed", delays)
    slow = {**delays, "BENCH_SCORE": str(_MOST_SECONDS * scale)}
    return instant, await step_seconds(case, steps, "tests.bench.delayed", slow)
