"""Tests use somebody's cluster when they are told to, and never because KUBECONFIG happens to be set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
EVERYTHING = {"KUBECONFIG": "/none/config", "KUBEBUILDER_ASSETS": "/none", "SUROGATE_TEST_CLUSTER": "1"}
LOOK = "from tests.helpers.cluster.kube_cluster import GIVEN, KUBECONFIG; print(GIVEN, KUBECONFIG)"


def printed(command: list[str], **variables: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in EVERYTHING}
    environment = {**clean, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.check_output(command, text=True, cwd=ROOT, env=environment, timeout=180)


@pytest.mark.parametrize(
    ("variables", "seen"),
    [
        ({"KUBECONFIG": "/none/config"}, "False"),
        ({"SUROGATE_TEST_CLUSTER": "1"}, "False"),
        ({"KUBECONFIG": "/none/config", "SUROGATE_TEST_CLUSTER": "1"}, "True /none/config"),
        ({"KUBEBUILDER_ASSETS": "/none", "KUBECONFIG": "/none/config"}, "True"),
    ],
)
def test_a_cluster_is_used_by_choice(variables: dict[str, str], seen: str) -> None:
    assert printed([sys.executable, "-c", LOOK], **variables).strip() == seen


@pytest.mark.parametrize(("target", "uses"), [("test", False), ("test-slow", False), ("test-cluster", True)])
def test_of_our_commands_one_uses_a_cluster(target: str, uses: bool) -> None:
    """What `make` would run, with pytest replaced by a look at what it would see."""
    lines = printed(["make", "-n", target], **EVERYTHING).replace("\\\n", " ").splitlines()
    [line] = [line for line in lines if " pytest " in f" {line}"]
    before, _, _ = line.partition("pytest ")
    seen = printed(["sh", "-c", f"{before}{sys.executable} -c '{LOOK}'"], **EVERYTHING)
    assert seen.startswith("True") == uses
