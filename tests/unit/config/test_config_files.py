"""What the repository ships: examples that load, and a configuration reference that is current."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from surogate.config.check import check_files
from surogate.config.job import resolve_job
from surogate.config.load import load_yaml
from surogate.config.reference import reference

ROOT = Path(__file__).parents[3]
GRPO = ("grpo", "episodes")
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_loads(path: Path) -> None:
    report = check_files([path])
    assert report.errors == []
    assert [warning for warning in report.warnings if "does not exist" not in warning] == []


@pytest.mark.parametrize("example", GRPO)
def test_the_grpo_examples_are_jobs(example: str) -> None:
    folder = ROOT / "examples" / example
    documents = {part: load_yaml(folder / f"{part}.yaml") for part in ("train", "infer", "orch")}
    parts = {part: document.data for part, document in documents.items()}
    job = resolve_job({"kind": "grpo", **parts}, sources=documents)
    assert job.warnings == []


def test_the_reference_is_current() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == reference(), "run: python -m surogate.config.reference > docs/configuration.md"


def test_configuration_loads_without_torch() -> None:
    code = (
        "import sys, surogate.config.check; print(sorted({'torch', 'vllm', 'transformers', 'grpc'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
