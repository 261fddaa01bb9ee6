"""examples/clients/launch.py, a program on nothing but the stubs, run as it is against orchestrators."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from surogate.v1 import job_pb2
from tests.helpers.fake_jobs import FakeOrchestrator, serving_jobs
from tests.helpers.grpo.grpo_files import write_grpo_files
from tests.helpers.orchestrator import orchestrating, serving_fake_trainer

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / "examples" / "clients" / "launch.py"


async def launch(*arguments: str, folder: Path) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(PROGRAM),
        *arguments,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def write_train(folder: Path, kind: str, steps: int) -> None:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "data.jsonl").write_text('{"text": "x", "messages": [{"role": "user", "content": "x"}]}\n')
    data = {"path": str(folder / "data.jsonl"), "type": "text" if kind == "pt" else "conversation"}
    train = {"model": str(folder / "model"), "output_dir": f"out-{kind}", "datasets": [data], "max_steps": steps}
    (folder / "train.yaml").write_text(json.dumps(train))  # JSON is YAML


@pytest.mark.parametrize("kind", ["pt", "sft"])
async def test_a_job_is_launched_and_followed(kind: str, tmp_path: Path) -> None:
    async with (
        serving_fake_trainer(step_seconds=0.01) as (trainer, _),
        orchestrating(tmp_path, launcher_name="static", trainer_address=trainer) as orchestrator,
    ):
        write_train(tmp_path, kind, steps=4)
        code, out, err = await launch(orchestrator.address, kind, "train=train.yaml", folder=tmp_path)
        assert code == 0, err
        steps = [line.partition(":")[0] for line in out.splitlines() if line.startswith("step ")]
        assert steps == ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]

        write_train(tmp_path, kind, steps=0)
        code, _, err = await launch(orchestrator.address, kind, "train=train.yaml", folder=tmp_path)
        assert code == 2
        assert "train.max_steps" in err


async def test_a_grpo_job_is_followed_over_lost_connections(tmp_path: Path) -> None:
    done = [job_pb2.StepCompleted(step=n, max_steps=5, metrics={"reward/mean": n / 10}) for n in range(1, 6)]
    fake = FakeOrchestrator([job_pb2.JobEvent(step_completed=step) for step in done], break_after=2)
    write_grpo_files(tmp_path)
    files = [f"{part}={part}.yaml" for part in ("train", "infer", "orch")]
    with serving_jobs(fake) as address:
        code, out, err = await launch(address, "grpo", *files, folder=tmp_path)
    assert code == 0, err
    assert fake.watched_from == [0, 2, 4]
    assert [line for line in out.splitlines() if line.startswith("step ")] == [
        f"step {n}/5: reward/mean {n / 10:.4f}" for n in range(1, 6)
    ]
    (job,) = fake.jobs.values()
    assert set(job.config) == {"kind", "train", "infer", "orch"}


def test_nothing_but_the_stubs_is_imported() -> None:
    tree = ast.parse(PROGRAM.read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name and name.startswith("surogate")} == {"surogate.v1"}
