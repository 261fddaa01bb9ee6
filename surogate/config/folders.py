"""Folders of the system, in which a job would leave its files among those of others, or write over them."""

from __future__ import annotations

import os
from pathlib import Path

_SYSTEM = tuple(map(Path, "/bin /boot /dev /etc /lib /lib32 /lib64 /proc /sbin /sys /usr".split()))  # noqa: SIM905
"""Nothing below them is a job's either, but for what is below `_FREE`."""

_FREE = (Path("/dev/shm"), Path("/usr/local"))  # noqa: S108 - below them there are folders of one's own

_SHARED = tuple(map(Path, "/ /dev/shm /home /root /run /tmp /usr/local /var".split()))  # noqa: SIM905
"""A folder below them may be a job's."""


def refusal(value: str) -> str:
    """Why a folder is not one to write into, in words that follow its key; empty if it is, or is relative."""
    path = _absolute(value)
    if path is None:
        return ""
    if path == _expanded("~") or path in _SHARED:
        return f"is {path}, where other files lie: name a folder of the job's own below it, such as {path / 'outputs'}"
    return file_refusal(value)


def file_refusal(value: str) -> str:
    """The same for a file: only what is in a folder of the system is refused."""
    path = _absolute(value)
    if path is None or any(folder in path.parents for folder in _FREE):
        return ""
    inside = next((folder for folder in _SYSTEM if path == folder or folder in path.parents), None)
    return "" if inside is None else f"is {path}, and {inside} belongs to the system: name another folder"


def _absolute(value: str) -> Path | None:
    path = _expanded(value)
    return path if path.is_absolute() else None


def _expanded(value: str) -> Path:
    """Without links looked up: what a path is called is what it is refused for. A user may have no home."""
    path = os.path.normpath(os.path.expanduser(value))  # noqa: PTH111
    return Path(f"/{path.lstrip('/')}" if path.startswith("//") else path)
