"""The pages for newcomers, done as they are written: their files, their commands, with fewer steps."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / name for name in ("quickstart-pt.md", "quickstart-sft.md")]
STEPS = ["--set", "max_steps=6", "--set", "eval_steps=3", "--set", "save_steps=3", "--set", "warmup_steps=1"]


def files_of(page: Path) -> dict[str, str]:
    """The files that a page shows, by the names in their first lines."""
    found = re.findall(r"```\w+\n(# (\S+\.(?:py|yaml))\n.*?)```", page.read_text(encoding="utf-8"), re.S)
    return {name: text for text, name in found}


def commands_of(page: Path) -> list[list[str]]:
    """The commands of a page that run and end here: those for servers are left out."""
    lines = re.findall(r"^    ((?:surogate|python) .+)$", page.read_text(encoding="utf-8"), re.M)
    return [shlex.split(line) for line in lines if not re.search(r" (serve|generate|--server) ", line)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_pages_work_as_they_are_written(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SUROGATE_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    for page in PAGES:
        for name, text in files_of(page).items():
            (tmp_path / name).write_text(text, encoding="utf-8")
    for program, *arguments in [command for page in PAGES for command in commands_of(page)]:
        module = ["-m", "surogate.cli.main"] if program == "surogate" else []
        fewer = STEPS if arguments[0] in {"pt", "sft"} else []
        done = subprocess.run(
            [sys.executable, *module, *arguments, *fewer],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join([program, *arguments])}\n{done.stdout}\n{done.stderr}"
    for file in (
        "pt/model.safetensors",
        "pt/plots/loss.png",
        "sft/model.safetensors",
        "lora/adapter_model.safetensors",
    ):
        assert (tmp_path / "output" / file).stat().st_size > 0
    assert (tmp_path / "merged" / "model.safetensors").exists()
