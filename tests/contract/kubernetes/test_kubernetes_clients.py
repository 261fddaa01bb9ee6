"""The launcher with the versions of the official client that it says it works with, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = ["test_kubernetes_launcher.py", "test_kubernetes_objects.py", "test_kubernetes_recorded.py"]
HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("version", ["36.0.3", "37.0.2"])
def test_another_version_of_the_client_does_as_well(tmp_path: Path, version: str) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    installed = subprocess.run([*install, f"kubernetes=={version}"], capture_output=True, text=True, timeout=120)
    if installed.returncode:
        pytest.skip(f"kubernetes {version} cannot be installed here: {installed.stderr.splitlines()[-1]}")
    paths = [str(tmp_path), str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    which = [sys.executable, "-c", "import kubernetes; print(kubernetes.__version__)"]
    assert subprocess.check_output(which, text=True, env=environment).strip() == version
    tests = [sys.executable, "-m", "pytest", "-q", "-x", *(str(HERE / name) for name in TESTS)]
    ran = subprocess.run(tests, capture_output=True, text=True, env=environment, timeout=280)
    assert ran.returncode == 0, ran.stdout[-4000:]
