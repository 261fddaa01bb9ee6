"""GRPO jobs whose adapters reach experts: `surogate grpo` with all services and vLLM, given merged weights."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from orchestrator_svc.jobs.metrics_file import read_metrics
from surogate.rollouts import step_files
from tests.helpers.grpo.grpo_files import write_grpo_files
from tests.helpers.models.architectures import make_model
from tests.helpers.shell import Shell, until_step

STEPS = [1, 2, 3, 4, 5, 6]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("name", "quantised"), [("qwen3-moe", False), ("gpt-oss", False), ("qwen3-moe", True)])
def test_experts_are_trained_and_sampled_from_also_by_a_replica_that_restarts(
    tmp_path: Path, name: str, quantised: bool
) -> None:
    make_model(name, tmp_path / "model")
    shell, out = Shell(tmp_path), tmp_path / "out"
    train = {
        "lora_target_modules": ["q_proj", "experts"], "max_steps": STEPS[-1], "per_device_train_batch_size": 16,
        "qlora_bnb": quantised,
    }  # fmt: skip
    process = shell.start(*write_grpo_files(tmp_path, train=train))
    lines = until_step(process, 2)
    for pid in shell.processes("-m inference_svc"):
        os.kill(pid, signal.SIGKILL)
    rest, err = process.communicate(timeout=400)
    assert process.returncode == 0, err + rest
    said = "".join(lines) + rest + err
    assert "pushed as merged weights" in said, "the plan"
    assert "inference is given merged weights after each step instead of the adapter, as lora_target_modules" in said

    metrics = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in metrics] == STEPS
    assert all(line["mismatch_kl"] < 1e-9 for line in metrics), "also after the replica was started anew"
    assert metrics[0]["canary/max_abs_diff"] <= 1e-5
    whole = (tmp_path / "model" / "model.safetensors").stat().st_size
    pushed = {line["push/bytes"] for line in metrics}
    assert len(pushed) == 1 and max(pushed) < 0.8 * whole, "of what no adapter is on nothing is pushed"
    rows = {step: pq.read_table(path).to_pylist() for step, path in step_files(out)}
    assert sorted(rows) == STEPS and all(len(found) == 16 for found in rows.values())
    assert all(0 <= row["reward"] <= 1 for found in rows.values() for row in found)
    adapter = load_file(out / "adapter_model.safetensors")
    moved = {weight for weight, value in adapter.items() if "lora_B" in weight and abs(value).max() > 0}
    assert any("experts" in weight for weight in moved)
    shell.wait_until(lambda: not shell.processes())
