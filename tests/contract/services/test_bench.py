"""The benchmarks run: tiny sizes, no figure is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.__main__ import main


def test_the_orchestrator_bench_runs_grpo_jobs_through_the_real_service(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    assert main(["orchestrator", "--quick", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["orchestrator"]
    assert [row["reward service"] for row in rows] == ["instant", "built-in"]
    assert all(row["rollouts/s"] > 0 for row in rows)


def test_the_push_bench_runs_both_transports(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    assert main(["push", "--quick", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["push"]
    assert [row["transport"] for row in rows] == ["shared_memory", "grpc"]
    assert all(row["ratio to TCP"] > 0 for row in rows)


def test_the_reward_bench_scores_by_each_reward(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    assert main(["reward", "reward_loop", "--quick", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {row["reward"] for row in found["reward"]} == {"quick", "math", "code"}
    assert all(row["items/s"] > 0 for row in found["reward"])
    assert all(row["ratio"] > 0 for row in found["reward_loop"])


@pytest.mark.slow  # two processes load torch
@pytest.mark.timeout(300)
def test_the_bench_for_a_card_runs_on_a_cpu_too(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    assert main(["trainer_gpu", "--quick", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["trainer_gpu"]
    assert [row["training"] for row in rows] == ["LoRA", "GRPO, LoRA"]
    assert all(row["tokens/s"] > 0 for row in rows)


@pytest.mark.slow  # engines are loaded
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["weights", "generate", "grpo", "scale"])
def test_the_benches_with_an_engine_run(tmp_path: Path, name: str) -> None:
    out = tmp_path / "bench.json"
    assert main([name, "--quick", "--json", str(out)]) == 0
    assert json.loads(out.read_text())[name]
