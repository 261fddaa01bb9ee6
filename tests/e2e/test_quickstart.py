"""The quickstart as `make quickstart` runs it, with real services throughout, and with very few steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
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


def start(folder: Path, mark: str) -> subprocess.Popen[str]:
    """Starts the quickstart with a trainer that does nothing, in a process group of its own as a terminal would."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TEST_MARK": mark,
        "FAKE_STEP_SECONDS": "0.1",
        "SUROGATE_ORCHESTRATOR_WORKER_MODULES": json.dumps({"trainer": "tests.helpers.trainer.fake_trainer"}),
    }
    # Where the tests run in the background of a shell, Ctrl-C is ignored until somebody says otherwise.
    as_in_a_terminal = ["env", "--default-signal=INT"]
    command = [*as_in_a_terminal, sys.executable, "examples/quickstart/run.py", f"--output={folder}"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def interrupt_at(process: subprocess.Popen[str], line_start: str) -> tuple[list[str], str]:
    """Presses Ctrl-C when a line begins so; what was printed until then, and standard error."""
    assert process.stdout is not None
    seen: list[str] = []
    for line in process.stdout:
        seen.append(line.rstrip())
        if line.startswith(line_start):
            os.killpg(process.pid, signal.SIGINT)
            break
    _, err = process.communicate(timeout=120)
    return seen, err


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    process = start(tmp_path / "made", mark)
    seen, err = interrupt_at(process, "step 5/")
    assert process.returncode == 130 and "the same command goes on from here" in err, err
    assert any(line.startswith("a Qwen3 configuration") for line in seen) and "Traceback" not in err
    process = start(tmp_path / "made", mark)
    seen, err = interrupt_at(process, "$ surogate sft")
    assert process.returncode == 130 and "Traceback" not in err, err
    assert not any(line.startswith("a Qwen3 configuration") for line in seen), "what is made is not made again"
    steps = [int(line.split()[1].split("/")[0]) for line in seen if line.startswith("step ")]
    assert steps[0] > 5 and steps[-1] == 80, "the pretraining resumes"
    left = [path for path in Path("/proc").glob("[0-9]*/environ") if mark.encode() in _read(path)]
    assert not left


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended meanwhile
        return b""
