"""Commands as a user would type them: printed, run in this terminal, and ended with this program."""

from __future__ import annotations

import ctypes
import shlex
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

INTERRUPTED = 130
PR_SET_PDEATHSIG = 1
STOP_SECONDS = 120.0
"""How long an interrupted command may take to save and to stop its processes."""


class CommandFailedError(RuntimeError):
    """A command that ended with an exit code other than 0."""

    def __init__(self, command: Sequence[str], code: int) -> None:
        super().__init__(f"this command ended with exit code {code}: {shlex.join(command)}")
        self.code = code


def surogate(*arguments: str) -> None:
    """Runs `surogate ARGUMENTS` of this installation. Raises CommandFailedError, or KeyboardInterrupt on Ctrl-C."""
    command = ["surogate", *arguments]
    print(f"\n$ {shlex.join(command)}", flush=True)
    script = Path(sysconfig.get_path("scripts")) / "surogate"
    prefix = [str(script)] if script.exists() else [sys.executable, "-m", "surogate.cli.main"]
    # It makes no threads of its own that could hold a lock, so that code may run between fork and exec.
    process = subprocess.Popen([*prefix, *arguments], preexec_fn=_end_with_parent)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # Ctrl-C went to the command as well, which saves and stops everything that it started.
        _wait_for_end(process)
        raise
    except SystemExit:
        process.send_signal(signal.SIGINT)
        _wait_for_end(process)
        raise
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code != 0:
        raise CommandFailedError(command, code)


def end_on_sigterm() -> None:
    """Makes SIGTERM end this program like an interruption of the command that runs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(INTERRUPTED))


def _end_with_parent() -> None:
    """Has the kernel interrupt the command if this program is killed (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _wait_for_end(process: subprocess.Popen[bytes]) -> None:
    """Waits for an interrupted command; a second Ctrl-C makes it stop at once, and it is killed if it does not."""
    for _ in range(2):
        with suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
            return
    process.kill()
    process.wait()
