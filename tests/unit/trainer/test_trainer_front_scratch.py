"""Memory files: gone with their process, and those of killed processes gone with the next one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from surogate.errors import ConfigError
from trainer_svc.scratch import Scratch

KILLED = """
import os, sys
from pathlib import Path
from trainer_svc.scratch import Scratch
Scratch(Path(sys.argv[1])).subfolder("v1")
os.kill(os.getpid(), 9)
"""


def test_a_closed_scratch_is_gone(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    (scratch.subfolder("v1") / "weights").write_bytes(b"x")
    scratch.close()
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scratch_dir: cannot write into .*/absent"):
        Scratch(tmp_path / "absent")


def test_a_subfolder_starts_empty(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    (scratch.subfolder("v1") / "weights").write_bytes(b"x")
    assert not list(scratch.subfolder("v1").iterdir())
    scratch.close()


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    living = Scratch(tmp_path)
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    other = Scratch(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([living.path, other.path])
