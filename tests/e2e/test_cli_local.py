"""`surogate sft` without a server: a real orchestrator as its child, fake trainers, kills, interrupts, nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Shell:
    """A folder to run `surogate` in; all processes that come of it carry a mark in their environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("SUROGATE_")} | {
            "TEST_MARK": self.mark,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "SUROGATE_ORCHESTRATOR_WORKER_MODULES": json.dumps({"trainer": "tests.helpers.fake_trainer"}),
        }
        (folder / "data.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')

    def config(self, mode: str = "fine", *, max_steps: int = 8, **keys: object) -> str:
        """Writes train.yaml; `mode` is what the fake trainer does."""
        (self.folder / mode).mkdir(exist_ok=True)
        train = {
            "model": f"./{mode}",
            "max_steps": max_steps,
            "save_steps": 2,
            "optimizer": "adamw",
            "output_dir": "out",
            "datasets": [{"path": "data.jsonl", "type": "conversation"}],
            **keys,
        }
        (self.folder / "train.yaml").write_text(json.dumps(train))
        return "train.yaml"

    def start(self, *arguments: str, step_seconds: float = 0.02) -> subprocess.Popen[str]:
        """Starts `surogate ARGUMENTS`."""
        return subprocess.Popen(
            [sys.executable, "-m", "surogate.cli.main", *arguments],
            cwd=self.folder,
            env=self.env | {"FAKE_STEP_SECONDS": str(step_seconds)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, step_seconds: float = 0.02) -> tuple[int, str, str]:
        """Runs it to its end: exit code, standard output, standard error."""
        process = self.start(*arguments, step_seconds=step_seconds)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def processes(self, text: str = "") -> list[int]:
        """Ids of the running processes that carry the mark and have `text` in their command line."""
        return [
            int(path.name)
            for path in Path("/proc").glob("[0-9]*")
            if f"TEST_MARK={self.mark}".encode() in _read(path / "environ") and text.encode() in _read(path / "cmdline")
        ]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that has no event; pytest's timeout bounds it."""
        while not condition():
            time.sleep(0.05)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended meanwhile
        return b""


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    shell.wait_until(lambda: not shell.processes())


def steps(out: str) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in out.splitlines() if line.startswith("step ")]


def until_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    assert any(line.startswith(f"step {step}/") for line in process.stdout), process.communicate()


def test_trains_and_says_how_it_went(shell: Shell) -> None:
    code, out, err = shell.run("sft", shell.config())
    assert code == 0, err
    assert steps(out) == list(range(1, 9))
    assert "succeeded" in out and "8 of 8" in out
    assert str(shell.folder / "out" / "metrics.jsonl") in out
    assert not shell.processes()


def test_wrong_configuration_starts_nothing(shell: Shell) -> None:
    code, out, err = shell.run("sft", shell.config(learning_rat=1e-4))
    assert (code, out) == (2, "")
    assert err.startswith("error: train.yaml:1: train.learning_rat: ")
    code, out, err = shell.run("sft", shell.config(datasets=[{"path": "./gone.jsonl", "type": "conversation"}]))
    assert (code, err) == (2, "error: train.yaml:1: train.datasets.0.path: './gone.jsonl' does not exist\n")
    assert not (shell.folder / "out").exists()


def test_a_failed_job_tells_why(shell: Shell) -> None:
    code, out, err = shell.run("sft", shell.config("diverges"))
    assert code == 1
    assert "error: the loss is not a number" in err and "logs are in" in err and "Traceback" not in err
    assert "failed" in out


def test_interrupting_once_saves_and_ends(shell: Shell) -> None:
    process = shell.start("sft", shell.config(max_steps=10_000, save_steps=10_000), step_seconds=0.05)
    until_step(process, 5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping: the job saves what it can" in out and "cancelled" in out
    assert list((shell.folder / "out").glob("checkpoint-*"))
    assert not shell.processes()


def test_interrupting_twice_ends_at_once(shell: Shell) -> None:
    process = shell.start("sft", shell.config(), step_seconds=600)
    shell.wait_until(lambda: bool(shell.processes("fake_trainer")))
    assert process.stdout is not None
    assert any(line.startswith("running") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    assert any(line.startswith("stopping") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped at once" in err
    shell.wait_until(lambda: not shell.processes())


def test_after_a_kill_nothing_is_left_and_the_same_command_goes_on(shell: Shell) -> None:
    process = shell.start("sft", shell.config(max_steps=30), step_seconds=0.1)
    until_step(process, 7)
    assert shell.processes("orchestrator_svc") and shell.processes("fake_trainer")
    process.kill()
    process.communicate()
    shell.wait_until(lambda: not shell.processes())
    code, out, err = shell.run("sft", "train.yaml")
    assert code == 0, err
    assert sorted(set(steps(out))) == list(range(1, 31)), "the events from before the kill are shown as well"
    lines = (shell.folder / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 31))


def test_another_configuration_replaces_an_unfinished_job(shell: Shell) -> None:
    process = shell.start("sft", shell.config(max_steps=1000), step_seconds=0.1)
    until_step(process, 3)
    process.kill()
    process.communicate()
    shell.wait_until(lambda: not shell.processes())
    code, out, err = shell.run("sft", shell.config(max_steps=6))
    assert code == 0, err
    assert "6 of 6" in out


def test_a_killed_orchestrator_is_started_again(shell: Shell) -> None:
    process = shell.start("sft", shell.config(max_steps=30), step_seconds=0.1)
    until_step(process, 7)
    for pid in shell.processes("orchestrator_svc"):
        os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "the orchestrator ended (exit code -9); starting it again" in out
    shown = steps(out)
    assert shown[-1] == 30 and "30 of 30" in out


def test_one_command_at_a_time_in_a_folder(shell: Shell) -> None:
    process = shell.start("sft", shell.config(max_steps=10_000), step_seconds=0.1)
    until_step(process, 1)
    code, _, err = shell.run("sft", "train.yaml")
    assert code == 1 and "another surogate command trains in" in err
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
