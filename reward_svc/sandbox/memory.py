"""Memory of a program and all that it started, seen from outside: limits of the kernel's own are for each process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TELLS_CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children").exists()


def exceeds(pid: int, limit: int) -> bool:
    """Whether a process and its descendants hold more than `limit` bytes together, pages that they share counted once.

    The sum of what each holds is looked at first: it is quickly had, and never less.
    """
    family = list(_family(pid))
    return sum(map(_resident, family)) > limit and sum(map(_proportional, family)) > limit


def files_in(pid: int, folder: str, size: int) -> int:
    """Files and folders that a program and its descendants have in their own file system of `size` bytes at `folder`:
    empty ones hold memory of the kernel all the same."""
    most = 0
    for member in _family(pid):
        with suppress(OSError):
            found = os.statvfs(f"/proc/{member}/root{folder}")
            if found.f_blocks * found.f_frsize == size:  # else it is not in its sandbox yet
                most = max(most, found.f_files - found.f_ffree)
    return most


def _family(pid: int) -> Iterator[int]:
    """A process and its descendants. Those whose parent ended are children of the sandbox's first process."""
    yield pid
    for child in _children(pid) if _TELLS_CHILDREN else _children_by_parent(pid):
        yield from _family(child)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):  # it ended meanwhile
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def _children_by_parent(pid: int) -> list[int]:
    """The slow way, where the kernel was built without CONFIG_PROC_CHILDREN."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def _resident(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    return 0


def _proportional(pid: int) -> int:
    """Resident bytes, a page that n processes share counted as an n-th; all of it where the kernel does not tell."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return _resident(pid)
