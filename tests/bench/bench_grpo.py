"""GRPO steps of a small model with short completions, against TRL: the overhead counts most."""

from __future__ import annotations

from tests.bench.table import Options, Table
from tests.bench.versus_trl import Case, compare

CASE = Case(layers=6, hidden=224, batch=128, tokens=16, steps=12, aim=1.0)


async def run(options: Options) -> Table:
    """About 3 million parameters, 128 rollouts of up to 16 tokens."""
    return await compare(CASE, options)
