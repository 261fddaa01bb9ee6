"""`surogate grpo` with everything real: four services, vLLM, kills of each of them, and what is left afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from orchestrator_svc.grpo.configured.setup import read_settings
from orchestrator_svc.jobs.metrics_file import read_metrics
from surogate.config.job import GrpoJob, resolve_job
from surogate.v1 import trainer_pb2
from tests.helpers.grpo.grpo_files import Ledger, Rows, write_grpo_files
from tests.helpers.models.tiny import make_tiny_model
from tests.helpers.shell import Shell, steps_shown, until_step
from tests.helpers.trainer.trainer_process import trainer_process

STEPS = list(range(1, 9))
ADAPTER = "adapter_model.safetensors"
pytestmark = pytest.mark.timeout(1500)


class GrpoShell(Shell):
    """A shell with a tiny model in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        make_tiny_model(folder / "model", std=0.1)
        self.out = folder / "out"
        self.ledger = Ledger(self.out / ".surogate" / "jobs.db")

    def kill(self, text: str) -> None:
        """Kills the processes with `text` in their command line: there are some."""
        found = self.processes(text)
        assert found, text
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    def losses(self) -> dict[int, float]:
        return {int(line["step"]): line["loss"] for line in read_metrics(self.out / "metrics.jsonl")}


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[GrpoShell]:
    shell = GrpoShell(tmp_path)
    yield shell
    shell.wait_until(lambda: not shell.processes())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[GrpoShell, str]:
    """A job that nobody disturbs, and what it printed."""
    shell = GrpoShell(tmp_path_factory.mktemp("undisturbed"))
    code, out, err = shell.run(*write_grpo_files(shell.folder))
    assert code == 0, err + out
    assert not shell.processes()
    return shell, out


@pytest.fixture
def rows(undisturbed: tuple[GrpoShell, str]) -> Rows:
    return undisturbed[0].ledger.rows()


def test_a_job_trains_to_its_end(undisturbed: tuple[GrpoShell, str]) -> None:
    shell, out = undisturbed
    assert steps_shown(out) == STEPS
    assert "succeeded" in out and "weight push" in out
    assert [(step, len(prompts)) for step, prompts in shell.ledger.rows()] == [(step, 4) for step in STEPS]
    assert all(version == step - 1 for step, prompts in shell.ledger.rows() for _, version in prompts)
    lines = read_metrics(shell.out / "metrics.jsonl")
    assert [line["step"] for line in lines] == STEPS
    assert lines[0]["canary/max_abs_diff"] <= 1e-5, "the replica's logprobs are the trainer's after the push"
    assert all(line["mismatch_kl"] < 1e-9 for line in lines), "on-policy rollouts are those of the trainer's policy"
    adapter = load_file(shell.out / ADAPTER)
    assert any(abs(weight).max() > 0 for name, weight in adapter.items() if "lora_B" in name)
    assert (shell.out / "plots" / "reward.png").exists()


@pytest.mark.slow
def test_a_job_over_a_quantised_base_samples_from_it_also_after_its_replica_and_its_trainer_died(
    shell: GrpoShell,
) -> None:
    """The replica starts on the model as it is, and is given the base over gRPC: no folder of the trainer's is read."""
    process = shell.start(*write_grpo_files(shell.folder, train={"qlora_bnb": True}))
    until_step(process, 3)
    shell.kill("-m inference_svc")
    until_step(process, 5)
    shell.kill("trainer_svc.worker")
    out, err = process.communicate()
    assert process.returncode == 0, err + out
    lines = read_metrics(shell.out / "metrics.jsonl")
    assert [line["step"] for line in lines] == STEPS
    assert all(line["mismatch_kl"] < 1e-9 for line in lines), "step 1 too, whose rollouts are those of the base"
    assert lines[0]["canary/max_abs_diff"] <= 1e-5
    assert not [path.name for path in shell.out.iterdir() if "base" in path.name and path.is_dir()]
    assert (shell.out / "base_quantization.json").exists()


def test_after_a_kill_of_the_command_nothing_is_left_and_the_same_command_goes_on(shell: GrpoShell, rows: Rows) -> None:
    arguments = write_grpo_files(shell.folder)
    process = shell.start(*arguments)
    until_step(process, 4)
    assert {name for name in SERVICES if shell.processes(name)} == set(SERVICES)
    process.kill()
    process.communicate()
    shell.wait_until(lambda: not shell.processes())
    code, out, err = shell.run(*arguments)
    assert code == 0, err
    assert sorted(set(steps_shown(out))) == STEPS, "the events from before the kill are shown as well"
    assert shell.ledger.rows() == rows
    assert list(shell.losses()) == STEPS


SERVICES = ("-m orchestrator_svc", "-m trainer_svc ", "-m trainer_svc.worker", "-m inference_svc", "-m reward_svc")


@pytest.mark.slow
async def test_kill_of_each_process_in_the_middle_of_a_step(shell: GrpoShell, rows: Rows, tmp_path: Path) -> None:
    """The rows are those of an undisturbed job; the weights, to the bit, those of a trainer that nobody disturbs."""
    process = shell.start(*write_grpo_files(shell.folder))
    printed = reading(process)
    ledger = shell.ledger
    shell.wait_until(ledger.keep_samples)
    killed_when(shell, "-m reward_svc", lambda: ledger.generates(2))
    killed_when(shell, "-m trainer_svc.worker", lambda: ledger.trains(3))
    killed_when(shell, "-m trainer_svc ", lambda: ledger.trains(5))
    killed_when(shell, "-m inference_svc", lambda: ledger.generates(6))
    killed_when(shell, "-m orchestrator_svc", lambda: ledger.trains(8))
    process.wait()
    out, err = printed()
    assert process.returncode == 0, err
    for worker in ("reward-0", "trainer-0", "inference-0"):
        assert f"{worker} was killed by signal 9; starting it again" in out
    assert "the orchestrator ended (exit code -9)" in out
    assert "trained again since the last checkpoint" in out, "steps behind the last checkpoint"
    assert ledger.rows() == rows
    assert list(shell.losses()) == STEPS

    weights, losses = await trained_by_itself(shell, tmp_path / "again")
    assert shell.losses() == losses
    adapter = load_file(shell.out / ADAPTER)
    assert adapter.keys() == weights.keys()
    assert all((adapter[name] == weights[name]).all() for name in adapter)


@pytest.mark.slow
def test_with_generation_ahead_every_prompt_reaches_one_end_whatever_is_killed(shell: GrpoShell) -> None:
    orch = {"max_async_level": 2, "refill_rounds": 2}
    process = shell.start(*write_grpo_files(shell.folder, train={"max_async_level": 2}, orch=orch))
    printed = reading(process)
    killed_when(shell, "-m trainer_svc ", lambda: shell.ledger.trains(2))
    killed_when(shell, "-m inference_svc", lambda: shell.ledger.generates(5))
    killed_when(shell, "-m orchestrator_svc", lambda: shell.ledger.generates(7))
    process.wait()
    out, err = printed()
    assert process.returncode == 0, err
    draws = shell.ledger.ask("SELECT ordinal, state FROM grpo_draws ORDER BY ordinal")
    assert [ordinal for ordinal, _ in draws] == list(range(len(draws)))
    assert {state for _, state in draws} <= {"trained", "dropped"}
    trained = "SELECT step, count(*) FROM grpo_draws WHERE state = 'trained' GROUP BY step ORDER BY step"
    assert shell.ledger.ask(trained) == [(step, 4) for step in STEPS], out
    assert list(shell.losses()) == STEPS


def killed_when(shell: GrpoShell, text: str, condition: Callable[[], bool]) -> None:
    """Kills what has `text` in its command line as soon as the condition holds."""
    shell.wait_until(condition, 0.002)
    shell.kill(text)


def reading(process: subprocess.Popen[str]) -> Callable[[], tuple[str, str]]:
    """Reads both outputs in the background, so that no pipe fills up; call the result when the process has ended."""
    parts: dict[str, str] = {}

    def read(name: str) -> None:
        stream = getattr(process, name)
        parts[name] = stream.read()

    threads = [threading.Thread(target=read, args=(name,)) for name in ("stdout", "stderr")]
    for thread in threads:
        thread.start()

    def result() -> tuple[str, str]:
        for thread in threads:
            thread.join()
        return parts["stdout"], parts["stderr"]

    return result


async def trained_by_itself(shell: GrpoShell, folder: Path) -> tuple[dict[str, object], dict[int, float]]:
    """Adapter and losses of a trainer that takes the same samples, step by step, without a break."""
    parts = {name: json.loads((shell.folder / f"{name}.yaml").read_text()) for name in ("train", "infer", "orch")}
    parts["train"] |= {"model": str(shell.folder / "model"), "output_dir": str(folder)}
    job = resolve_job({"kind": "grpo", **parts})
    assert isinstance(job, GrpoJob)
    losses = {}
    async with trainer_process(folder) as trainer:
        await trainer.ready(dict(read_settings(job).train))
        for step, blob in shell.ledger.kept_samples().items():
            samples = trainer_pb2.TrainStepSamples.FromString(zlib.decompress(blob)).samples
            losses[step] = (await trainer.train(step, list(samples)))["loss"]
        await trainer.checkpoint(STEPS[-1], final=True)
    return load_file(folder / ADAPTER), losses
