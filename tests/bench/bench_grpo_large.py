"""GRPO steps of a larger model with longer completions, against TRL: generation and training count most."""

from __future__ import annotations

from tests.bench.table import Options, Table
from tests.bench.versus_trl import Case, compare

CASE = Case(layers=16, hidden=640, batch=32, tokens=128, steps=3, aim=2.0, levels=(0,))


async def run(options: Options) -> Table:
    """About 60 million parameters, 32 rollouts of up to 128 tokens."""
    return await compare(CASE, options)
