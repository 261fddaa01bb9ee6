"""`surogate sft` without a server: a real orchestrator as its child, fake trainers, kills, interrupts, nothing left."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.shell import Shell, steps_shown, until_step


class SftShell(Shell):
    """A shell with data, whose orchestrator starts fake trainers."""

    def __init__(self, folder: Path) -> None:
        fake = json.dumps({"trainer": "tests.helpers.trainer.fake_trainer"})
        super().__init__(folder, {"SUROGATE_ORCHESTRATOR_WORKER_MODULES": fake, "FAKE_STEP_SECONDS": "0.02"})
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


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[SftShell]:
    shell = SftShell(tmp_path)
    yield shell
    shell.wait_until(lambda: not shell.processes())


def test_trains_and_says_how_it_went(shell: SftShell) -> None:
    code, out, err = shell.run("sft", shell.config())
    assert code == 0, err
    assert steps_shown(out) == list(range(1, 9))
    assert "succeeded" in out and "8 of 8" in out
    assert str(shell.folder / "out" / "metrics.jsonl") in out
    assert not shell.processes()


def test_wrong_configuration_starts_nothing(shell: SftShell) -> None:
    code, out, err = shell.run("sft", shell.config(learning_rat=1e-4))
    assert (code, out) == (2, "")
    assert err.startswith("error: train.yaml:1: train.learning_rat: ")
    code, out, err = shell.run("sft", shell.config(datasets=[{"path": "./gone.jsonl", "type": "conversation"}]))
    assert (code, err) == (2, "error: train.yaml:1: train.datasets.0.path: './gone.jsonl' does not exist\n")
    assert not (shell.folder / "out").exists()


def test_a_failed_job_tells_why(shell: SftShell) -> None:
    code, out, err = shell.run("sft", shell.config("diverges"))
    assert code == 1
    assert "error: the loss is not a number" in err and "logs are in" in err and "Traceback" not in err
    assert "failed" in out


def test_interrupting_once_saves_and_ends(shell: SftShell) -> None:
    process = shell.start("sft", shell.config(max_steps=10_000, save_steps=10_000), FAKE_STEP_SECONDS="0.05")
    until_step(process, 5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "stopping: the job saves what it can" in out and "cancelled" in out
    assert list((shell.folder / "out").glob("checkpoint-*"))
    assert not shell.processes()


def test_interrupting_twice_ends_at_once(shell: SftShell) -> None:
    process = shell.start("sft", shell.config(), FAKE_STEP_SECONDS="600")
    shell.wait_until(lambda: bool(shell.processes("fake_trainer")))
    assert process.stdout is not None
    assert any(line.startswith("running") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    assert any(line.startswith("stopping") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 130 and "stopped at once" in err
    shell.wait_until(lambda: not shell.processes())


def test_after_a_kill_nothing_is_left_and_the_same_command_goes_on(shell: SftShell) -> None:
    process = shell.start("sft", shell.config(max_steps=30), FAKE_STEP_SECONDS="0.1")
    until_step(process, 7)
    assert shell.processes("orchestrator_svc") and shell.processes("fake_trainer")
    process.kill()
    process.communicate()
    shell.wait_until(lambda: not shell.processes())
    code, out, err = shell.run("sft", "train.yaml")
    assert code == 0, err
    assert sorted(set(steps_shown(out))) == list(range(1, 31)), "the events from before the kill are shown as well"
    lines = (shell.folder / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 31))


def test_another_configuration_replaces_an_unfinished_job(shell: SftShell) -> None:
    process = shell.start("sft", shell.config(max_steps=1000), FAKE_STEP_SECONDS="0.1")
    until_step(process, 3)
    process.kill()
    process.communicate()
    shell.wait_until(lambda: not shell.processes())
    code, out, err = shell.run("sft", shell.config(max_steps=6))
    assert code == 0, err
    assert "6 of 6" in out


def test_a_killed_orchestrator_is_started_again(shell: SftShell) -> None:
    process = shell.start("sft", shell.config(max_steps=30), FAKE_STEP_SECONDS="0.1")
    until_step(process, 7)
    for pid in shell.processes("orchestrator_svc"):
        os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "the orchestrator ended (exit code -9); starting it again" in out
    shown = steps_shown(out)
    assert shown[-1] == 30 and "30 of 30" in out


def test_one_command_at_a_time_in_a_folder(shell: SftShell) -> None:
    process = shell.start("sft", shell.config(max_steps=10_000), FAKE_STEP_SECONDS="0.1")
    until_step(process, 1)
    code, _, err = shell.run("sft", "train.yaml")
    assert code == 1 and "another surogate command trains in" in err
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=180)
    assert process.returncode == 130
