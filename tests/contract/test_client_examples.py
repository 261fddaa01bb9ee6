"""examples/clients/: programs on nothing but the stubs, run as they are against an orchestrator with a fake trainer."""

from __future__ import annotations

import ast
import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.helpers.orchestrator import Orchestrator, orchestrating, serving_fake_trainer

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted((ROOT / "examples" / "clients").glob("launch_*.py"))


@pytest_asyncio.fixture
async def orchestrator(tmp_path: Path) -> AsyncIterator[Orchestrator]:
    async with (
        serving_fake_trainer(step_seconds=0.01) as (address, _),
        orchestrating(tmp_path, launcher_name="static", trainer_address=address) as orchestrator,
    ):
        yield orchestrator


async def launch(program: Path, *arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(program),
        *arguments,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
async def test_a_job_is_launched_and_followed(program: Path, orchestrator: Orchestrator, tmp_path: Path) -> None:
    (tmp_path / "fine").mkdir()
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "x", "messages": [{"role": "user", "content": "x"}]}\n')
    code, out, err = await launch(program, orchestrator.address, str(tmp_path / "fine"), str(data), "4")
    assert code == 0, err
    steps = [line.partition(":")[0] for line in out.splitlines() if line.startswith("step ")]
    assert steps == ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]
    code, _, err = await launch(program, orchestrator.address, str(tmp_path / "fine"), str(data), "0")
    assert code == 2
    assert "train.max_steps" in err


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_nothing_but_the_stubs_is_imported(program: Path) -> None:
    tree = ast.parse(program.read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name and name.startswith("surogate")} == {"surogate.v1"}
