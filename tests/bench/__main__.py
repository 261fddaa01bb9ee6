"""`python -m tests.bench [NAME…]`: runs benchmarks, prints their tables and writes them into docs/performance.md.

Everything runs on this machine; figures compare what was measured in one run. `--quick` only tries whether it works.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import shlex
import sys
from pathlib import Path

from tests.bench.page import conditions, update
from tests.bench.table import Options, Table

NAMES = (
    "orchestrator",
    "push",
    "weights",
    "generate",
    "grpo",
    "grpo_large",
    "reward",
    "reward_loop",
    "scale",
    "trainer",
    "trainer_gpu",
)
FOR_A_CARD = ("trainer_gpu",)
"""Run when they are named: without a CUDA device they are of no use but with --quick."""
PAGE = Path("docs/performance.md")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round; docs/performance.md stays")
    parser.add_argument("--rounds", type=int, help="rounds of each figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tables there, as one object")
    parser.add_argument("--no-page", action="store_true", help="leave docs/performance.md as it is")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    said = conditions(shlex.join(["python", "-m", "tests.bench", *(sys.argv[1:] if argv is None else argv)]))
    tables: dict[str, Table] = {}
    for name in arguments.names or [name for name in NAMES if name not in FOR_A_CARD]:
        module = importlib.import_module(f"tests.bench.bench_{name}")
        tables[name] = asyncio.run(module.run(Options.of(arguments)))
        print("\n".join([f"\n{name}: {said}", *tables[name].lines()]), flush=True)
        if not (arguments.quick or arguments.no_page):
            update(PAGE, name, tables[name], said)
    if arguments.json:
        found = {name: table.records() for name, table in tables.items()}
        arguments.json.write_text(json.dumps({"conditions": said, **found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
