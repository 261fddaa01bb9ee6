"""Starts programs that nobody trusts: what is around them, what they may use, and how they end."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import marshal
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from reward_svc.sandbox.memory import exceeds, files_in
from surogate.errors import FailedPreconditionError
from surogate.process import hide_from_peers
from surogate.telemetry.log import get_logger

MIB = 1 << 20
TEMPORARY_BYTES = 64 * MIB
"""Size of /tmp in the sandbox, the only place that can be written to."""

MAX_FILES = 10_000
"""Files that a program may have there at once."""

_STOP_SECONDS = 5.0
_WATCH_SECONDS = 0.05
_FIRST_UID, _UIDS = 1_900_000_000, 100_000
_HERE = Path(__file__).parent
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
_PYTHON = "/python/bin/python3"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_SEALED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_log = get_logger("sandbox")


class Role(Enum):
    """What runs in a sandbox."""

    SCRIPT = ("inside_script",)
    SOLUTION = ("inside_wire", "inside_solution")
    TESTS = ("inside_wire", "inside_tests")


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float
    """Processor time, rounded up; of wall time `wall`."""
    memory: int = 256 * MIB
    """Bytes that all of its processes hold together; each has that much address space."""
    processes: int = 8
    """Processes and threads."""
    file_bytes: int = 16 * MIB
    """Largest file."""
    output_bytes: int = 4 * MIB
    """Most that is read of its output; more ends it."""

    @property
    def wall(self) -> float:
        """Wall time, in seconds: a verdict should not depend on how busy the machine is."""
        return 2 * self.seconds + 5

    def resources(self) -> dict[str, int]:
        """As resource limits."""
        return {
            "RLIMIT_CPU": int(self.seconds) + 1,
            "RLIMIT_AS": self.memory,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
            "RLIMIT_SIGPENDING": 1024,
        }


class Sandbox:
    """A way to confine programs, that was seen to work on this machine."""

    def __init__(self, prefix: Sequence[str], name: str) -> None:
        self._prefix = tuple(prefix)
        self.name = name
        self._uids = itertools.cycle(range(_FIRST_UID, _FIRST_UID + _UIDS))

    @classmethod
    def find(cls, *, allow_unsafe: bool) -> Sandbox:
        """bubblewrap, with namespaces of its own, if it works here; else, only if allowed, limits alone.

        Raises FailedPreconditionError.
        """
        bwrap = shutil.which("bwrap")
        problem = "bubblewrap (bwrap) is not installed"
        if bwrap is not None:
            sandbox = cls(_bubblewrap(bwrap), "bubblewrap")
            problem = sandbox.problem()
            if not problem:
                return sandbox
        if not allow_unsafe:
            raise FailedPreconditionError(
                f"there is no safe way to run programs on this machine: {problem}. Install bubblewrap and allow user "
                "namespaces, or run the reward service in a container that is locked down and set allow_unsafe_code",
                reason="NO_SANDBOX",
            )
        hide_from_peers()  # programs run as the user of this service
        _log.warning("programs run without a sandbox, with limits alone", problem=problem)
        return cls((), "none")

    def problem(self) -> str:
        """What is wrong with it here; empty if it works."""
        command, fd = self._command(Role.SCRIPT, {"program": "print('works')"}, Limits(seconds=10), channel=None)
        try:
            ran = subprocess.run(  # noqa: S603
                command, pass_fds=[fd], capture_output=True, text=True, timeout=30, env={}, check=False
            )
        except subprocess.TimeoutExpired:
            return "it hangs"
        finally:
            os.close(fd)
        return (
            "" if ran.stdout == "works\n" else (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
        )

    async def start(
        self,
        role: Role,
        payload: Mapping[str, Any],
        limits: Limits,
        *,
        stdin: bytes = b"",
        channel: int | None = None,
        output: bool = True,
    ) -> Program:
        """Starts a program. It gets `stdin`, and the socket `channel` if there is one; nothing else is open in it."""
        command, payload_fd = self._command(role, payload, limits, channel)
        stdin_fd = _file(stdin)
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=stdin_fd,
                stdout=asyncio.subprocess.PIPE if output else asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                pass_fds=[payload_fd, *([] if channel is None else [channel])],
                env={},
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(payload_fd)
            os.close(stdin_fd)
        return Program(process, limits.memory, own_files=bool(self._prefix))

    def _command(
        self, role: Role, payload: Mapping[str, Any], limits: Limits, channel: int | None
    ) -> tuple[list[str], int]:
        config = {
            # A user of its own for each program where the service may choose; else that of the service.
            "uid": next(self._uids) if self._prefix and os.geteuid() == 0 else None,
            "limits": limits.resources(),
            "channel": channel,
        }
        fd = _file(marshal.dumps((config, dict(payload))))  # it is read by this very Python
        python = _PYTHON if self._prefix else _interpreter()
        return [*self._prefix, python, "-I", "-S", "-B", "-c", _text(role), str(fd)], fd


class Program:
    """A program that runs. It is killed when all of its processes together hold more memory or files than they may."""

    def __init__(self, process: asyncio.subprocess.Process, memory: int, *, own_files: bool) -> None:
        """`own_files`: whether it has a /tmp of its own, whose files are counted."""
        self._process = process
        self._memory = memory
        self._own_files = own_files
        self._watch = asyncio.create_task(self._watched())
        self.too_large = False
        """Whether it was killed for its memory or its files."""

    @property
    def stdout(self) -> asyncio.StreamReader:
        """What it prints, where that is read at all."""
        assert self._process.stdout is not None
        return self._process.stdout

    async def wait(self) -> int:
        """Waits for its end; returns the exit code."""
        return await self._process.wait()

    async def stop(self) -> None:
        """Kills it and all that it started."""
        self._watch.cancel()
        self._kill()
        with suppress(TimeoutError):  # without a sandbox, what it left behind may hold its output open
            async with asyncio.timeout(_STOP_SECONDS):
                # asyncio waits for the end of its output too, and stops reading where nobody takes what was read.
                while self._process.stdout is not None and await self._process.stdout.read(MIB):
                    pass
                await self._process.wait()

    async def _watched(self) -> None:
        while self._process.returncode is None:
            pid = self._process.pid
            if exceeds(pid, self._memory) or (self._own_files and _files(pid) > MAX_FILES):
                self.too_large = True
                self._kill()
                return
            await asyncio.sleep(_WATCH_SECONDS)

    def _kill(self) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


def _files(pid: int) -> int:
    return files_in(pid, "/tmp", TEMPORARY_BYTES)  # noqa: S108


def _file(content: bytes) -> int:
    """An anonymous file in memory, opened at its beginning, which nobody can change or make larger any more."""
    fd = os.memfd_create("surogate", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALED)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


@cache
def _text(role: Role) -> str:
    return "\n".join((_HERE / f"{name}.py").read_text(encoding="utf-8") for name in ("inside_confine", *role.value))


def _interpreter() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _bubblewrap(bwrap: str) -> list[str]:
    """The command before the program: own namespaces, and of the machine's files the libraries alone."""
    privileged = os.geteuid() == 0
    command = [bwrap, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if privileged:  # the program changes to a user of its own, for which these two are kept until then
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    command += ["--die-with-parent", "--new-session", "--clearenv", "--hostname", "program"]
    command += ["--setenv", "LD_LIBRARY_PATH", "/python/lib"]
    command += ["--setenv", "PATH", "/nowhere", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"]  # noqa: S108
    # Else bubblewrap makes them, for root alone.
    for path in ("/dev", "/etc", "/usr", "/python", "/python/bin"):
        command += ["--perms", "0755", "--dir", path]
    for path in _LIBRARIES:
        command += ["--ro-bind-try", path, path]
    # Python is put where every user can go: it may be installed in somebody's home.
    command += ["--ro-bind", str(Path(sys.base_prefix) / "lib"), "/python/lib", "--ro-bind", _interpreter(), _PYTHON]
    for path in _packages():  # this service's code and its neighbours
        command += ["--size", str(MIB), "--tmpfs", path, "--remount-ro", path]
    # Its first process is bubblewrap, of the same user where the service is not root, without our limits and filter: a
    # program that reached its memory by /proc would have got out.
    command += [
        "--proc",
        "/proc",
        "--size",
        str(MIB),
        "--perms",
        "0555",
        "--tmpfs",
        "/proc/1",
        "--remount-ro",
        "/proc/1",
    ]
    for path in _DEVICES:
        command += ["--dev-bind", path, path]
    temporary = ["--perms", "1777", "--size", str(TEMPORARY_BYTES), "--tmpfs", "/tmp"]  # noqa: S108
    return [*command, *temporary, "--remount-ro", "/", "--chdir", "/tmp", "--"]  # noqa: S108


def _packages() -> list[str]:
    """Folders of installed packages, as the sandbox would see them."""
    version = f"python{sysconfig.get_python_version()}"
    library = Path(sys.base_prefix) / "lib"
    found = [f"{version}/site-packages", f"{version}/dist-packages", "python3/dist-packages"]
    masked = [f"/python/lib/{path}" for path in found if (library / path).is_dir()]
    return masked + [path for path in ("/usr/lib/python3/dist-packages",) if Path(path).is_dir()]
