"""Who an orchestrator is, so that another can tell whether it still lives.

A job's row names its owner as `host/pid-namespace/pid/start-time/random`. On the same host and in the same process
namespace a successor sees at once that the owner is dead; from elsewhere the lease has to run out.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path


def make_identity() -> str:
    """A name for this orchestrator, unlike any other's."""
    pid = os.getpid()
    return "/".join([_host(), _namespace(), str(pid), _start_time(pid) or "0", secrets.token_hex(4)])


def is_known_dead(owner: str) -> bool:
    """Whether the owner certainly runs no more. False means alive or not known."""
    try:
        host, namespace, pid, start_time, _ = owner.split("/")
    except ValueError:
        return False
    if (host, namespace) != (_host(), _namespace()) or not namespace:
        return False
    return _start_time(int(pid)) != start_time


def _host() -> str:
    return socket.gethostname().replace("/", "-")


def _namespace() -> str:
    """The process namespace with the boot of the machine; empty where /proc is not there."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot[:8]}-{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """Clock ticks after boot at which a process started; None if there is none (or only its unreaped remains)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name in parentheses may hold spaces
    return None if fields[0] in {"Z", "X"} else fields[19]
