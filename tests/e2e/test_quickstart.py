"""The quickstart as `make quickstart` runs it, with real services throughout, and with very few steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_random_weights_to_a_summary(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    command = [sys.executable, "examples/quickstart/run.py", f"--output={folder}", "--seed=3", f"--max-steps={STEPS}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ surogate ")] == [
        "pt",
        "sft",
        "grpo",
    ]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["seed"] == 3
    reward = summary["held_out_reward"]
    assert 0 <= reward["before"] <= 1 and reward["gain"] == pytest.approx(reward["after"] - reward["before"])
    assert summary["push"]["bytes"] > 0 and summary["push"]["milliseconds"] > 0
    assert all(summary["phase_seconds_per_step"][part] > 0 for part in ("generate", "score", "train", "push"))
    assert summary["samples"] and all(sample["answer"] == sample["prompt"][::-1] for sample in summary["samples"])
    assert (folder / "grpo" / "plots" / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert len((folder / "grpo" / "metrics.jsonl").read_text().splitlines()) == STEPS
    assert (folder / "grpo" / "adapter_model.safetensors").exists()
    assert "→" in (folder / "summary.md").read_text()


def test_it_runs_in_the_repository_only(tmp_path: Path) -> None:
    script = ROOT / "examples" / "quickstart" / "run.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "run this in the folder of the repository" in done.stderr
    assert not list(tmp_path.iterdir())
