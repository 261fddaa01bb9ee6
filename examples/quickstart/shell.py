"""Commands as a user would type them: printed, run in this terminal, and ended with this program."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

INTERRUPTED = 130
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
    process = subprocess.Popen([*_ending_with_parent(), *prefix, *arguments])
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
    if code in (INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    if code != 0:
        raise CommandFailedError(command, code)


def end_on_sigterm() -> None:
    """Makes SIGTERM end this program like an interruption of the command that runs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(INTERRUPTED))


def _ending_with_parent() -> list[str]:
    """What goes before a command so that the kernel ends it if this program is killed (util-linux, on Linux).

    Code of our own between fork and exec would do it too, and lose a Ctrl-C that comes just then.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []


def _wait_for_end(process: subprocess.Popen[bytes]) -> None:
    """Waits for an interrupted command; a second Ctrl-C makes it stop at once, and it is killed if it does not."""
    for _ in range(2):
        with suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
            return
    process.kill()
    process.wait()
