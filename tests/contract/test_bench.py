"""The benchmarks run: tiny sizes, no figure is judged."""

from __future__ import annotations

import json
from pathlib import Path

from tests.bench.__main__ import main


def test_the_orchestrator_bench_runs_grpo_jobs_through_the_real_service(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    assert main(["orchestrator", "--quick", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["orchestrator"]
    assert [row["reward service"] for row in rows] == ["instant", "built-in"]
    assert all(row["rollouts/s"] > 0 for row in rows)
