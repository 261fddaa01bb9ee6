"""Child processes: starting a service and learning its address, and dying with one's parent."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from surogate.errors import DeadlineError, UnavailableError

PARENT_PID = "SUROGATE_PARENT_PID"
TOKEN = "SUROGATE_TOKEN"  # noqa: S105 - a variable's name
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_POLL_SECONDS = 0.05
_parent: int | None = None


def die_with_parent() -> None:
    """Asks the kernel for a SIGTERM when the parent dies, if the variable SUROGATE_PARENT_PID names the parent.

    Linux only; elsewhere it does nothing. Exits at once if the parent is gone already. The signal comes when the thread
    that made this process ends, so a parent starts children from a thread that lives as long as they should.
    """
    global _parent
    named = os.environ.pop(PARENT_PID, "")  # children of ours are not children of that process
    if not named or not sys.platform.startswith("linux"):
        return
    _parent = int(named)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if parent_is_gone():
        sys.exit(f"the parent process {named} is gone")


def hide_from_peers() -> None:
    """Keeps other processes of the same user out of this one's memory, environment and open files. Linux only."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")


def parent_is_gone() -> bool:
    """Whether the parent that this process should die with has died."""
    return _parent is not None and os.getppid() != _parent


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for a child that dies with it, with `extra` on top."""
    return {**os.environ, PARENT_PID: str(os.getpid()), **(extra or {})}


@dataclass(frozen=True)
class Announcement:
    """Where a started service is: gRPC and metrics addresses (the latter empty when off), and its process id."""

    address: str
    metrics_address: str
    pid: int

    def write(self, path: Path) -> None:
        """Writes it as JSON, so that readers see all of it or nothing. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            json.dump(self.__dict__, file)
        Path(file.name).replace(path)

    @classmethod
    def read(cls, path: Path) -> Announcement | None:
        """Reads what `write` wrote; None while it is not there."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None


@dataclass
class ServiceProcess:
    """A service that runs as a child process, in a session of its own."""

    name: str
    process: asyncio.subprocess.Process
    announcement: Announcement
    log_file: Path

    @property
    def address(self) -> str:
        """gRPC address, HOST:PORT."""
        return self.announcement.address

    async def stop(self, grace: float = 10.0) -> int:
        """SIGTERM, then after `grace` seconds SIGKILL to it and whatever it started; returns the exit code."""
        return await stop_process(self.process, grace)


async def start_service(
    module: str,
    arguments: Sequence[str] = (),
    *,
    log_file: Path,
    token: str | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float = 60.0,
    name: str | None = None,
    listen: str = "127.0.0.1:0",
) -> ServiceProcess:
    """Starts `python -m module` on `listen` (a free loopback port) and waits until it listens.

    The child dies with this process, takes only calls with `token` (its variable SUROGATE_TOKEN), and appends its
    output to `log_file`. Call it from the main thread. Raises UnavailableError with the log's last lines if it exits
    before it listens, DeadlineError if it does not listen within `timeout` seconds.
    """
    name = name or module
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="surogate-") as folder:
        announce = Path(folder) / "announce.json"
        command = [sys.executable, "-m", module, "--listen", listen, "--announce-file", str(announce)]
        command += ["--token-env", TOKEN] if token else []
        env = child_environment({**(environment or {}), **({TOKEN: token} if token else {})})
        with log_file.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                *arguments,
                env=env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(timeout):
                announcement = await _announced(process, announce, name, log_file)
        except TimeoutError as error:
            await stop_process(process, grace=1.0)
            raise DeadlineError(f"{name} did not listen within {timeout:g} s; see {log_file}") from error
        except BaseException:
            await stop_process(process, grace=1.0)
            raise
    return ServiceProcess(name, process, announcement, log_file)


async def stop_process(process: asyncio.subprocess.Process, grace: float = 10.0) -> int:
    """Ends a child made with `start_new_session`: SIGTERM, then SIGKILL to its whole process group after `grace` s."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.terminate()
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), grace)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind, or itself
    return await process.wait()


def last_lines(log_file: Path, count: int = 5, limit: int = 4096) -> str:
    """The last `count` lines of a log, at most `limit` bytes; empty if there is none."""
    try:
        with log_file.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - limit))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.strip().splitlines()[-count:])


async def _announced(process: asyncio.subprocess.Process, announce: Path, name: str, log_file: Path) -> Announcement:
    while (found := Announcement.read(announce)) is None:
        if process.returncode is not None:
            said = last_lines(log_file)
            raise UnavailableError(
                f"{name} exited with code {process.returncode} before it listened; {log_file} ends with:\n{said}",
                reason="START_FAILED",
                metadata={"exit_code": str(process.returncode)},
            )
        await asyncio.sleep(_POLL_SECONDS)
    return found
