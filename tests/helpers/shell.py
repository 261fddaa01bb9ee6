"""`surogate` as a user runs it: in a folder, its processes marked so that a test can find and kill them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Shell:
    """A folder to run `surogate` in; all processes that come of it carry a mark in their environment."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._mark = f"TEST_MARK={uuid.uuid4().hex}"
        name, value = self._mark.split("=")
        ours = {key: text for key, text in os.environ.items() if not key.startswith("SUROGATE_")}
        self.env = ours | {name: value, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | dict(environment or {})

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Starts `surogate ARGUMENTS`."""
        return subprocess.Popen(
            [sys.executable, "-m", "surogate.cli.main", *arguments],
            cwd=self.folder,
            env=self.env | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, timeout: float | None = None, **environment: str) -> tuple[int, str, str]:
        """Runs it to its end, for which pytest sets a time: exit code, standard output, standard error."""
        process = self.start(*arguments, **environment)
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.terminate()  # it stops what it started
            process.communicate()
            raise
        return process.returncode, out, err

    def processes(self, text: str = "") -> list[int]:
        """Ids of the running processes that carry the mark and have `text` in their command line, its words joined by
        spaces."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            if self._mark.encode() not in _read(path / "environ"):
                continue
            if text.encode() in _read(path / "cmdline").replace(b"\0", b" "):
                found.append(int(path.name))
        return found

    def wait_until(self, condition: Callable[[], bool], seconds: float = 0.05) -> None:
        """Waits for something that has no event; pytest's timeout bounds it."""
        while not condition():
            time.sleep(seconds)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended meanwhile
        return b""


def steps_shown(out: str) -> list[int]:
    """Numbers of the steps that plain output shows."""
    return [int(line.split()[1].split("/")[0]) for line in out.splitlines() if line.startswith("step ")]


def until_step(process: subprocess.Popen[str], step: int) -> list[str]:
    """Reads plain output up to the line of a step; returns the lines."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(f"step {step}/"):
            return lines
    raise AssertionError(f"it ended before step {step}: {''.join(lines)}{process.communicate()}")
