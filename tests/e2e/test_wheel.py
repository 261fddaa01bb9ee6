"""`pip install .` of a clean checkout: the package has its stubs, and nothing that does not belong to it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
STUBS = ("common", "inference", "job", "reward", "trainer", "weights")


def checkout(folder: Path) -> Path:
    """A copy of the files that git has, and of those only: no generated stubs, nothing installed."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    assert not (folder / "surogate" / "v1").exists()
    return folder


@pytest.mark.parametrize(
    "isolation", [["--no-build-isolation"], pytest.param([], marks=pytest.mark.slow)], ids=["as-is", "isolated"]
)
def test_a_clean_checkout_installs_with_its_stubs(tmp_path: Path, isolation: list[str]) -> None:
    source = checkout(tmp_path / "checkout")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        *isolation,
        "-w",
        str(tmp_path),
        str(source),
    ]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("surogate-*.whl")
    files = set(ZipFile(wheel).namelist())
    for name in STUBS:
        assert {f"surogate/v1/{name}_pb2.py", f"surogate/v1/{name}_pb2_grpc.py", f"surogate/v1/{name}_pb2.pyi"} <= files
    assert {"surogate/internal/v1/worker_pb2.py", "surogate/py.typed"} <= files
    tops = {name.partition("/")[0] for name in files if not name.partition("/")[0].endswith(".dist-info")}
    assert tops == {"surogate", "trainer_svc", "inference_svc", "orchestrator_svc", "reward_svc"}
    said = imported_from(wheel)
    assert said.returncode == 0, said.stderr
    assert str(wheel) in said.stdout


def imported_from(wheel: Path) -> subprocess.CompletedProcess[str]:
    """What Python says where the stubs are, with the wheel before everything else on its path."""
    program = (
        f"import sys; sys.path.insert(0, {str(wheel)!r})\n"
        "from surogate.v1 import job_pb2_grpc, reward_pb2\n"
        "from surogate.internal.v1 import worker_pb2\n"
        "print(job_pb2_grpc.__file__, reward_pb2.Environment(id='x').id, worker_pb2.DESCRIPTOR.name)\n"
    )
    command = [sys.executable, "-I", "-c", program]
    return subprocess.run(command, cwd=wheel.parent, capture_output=True, text=True, timeout=180, check=False)
