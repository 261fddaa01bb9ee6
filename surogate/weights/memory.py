"""Files in memory: a private folder under /dev/shm that vanishes with its process, and files allocated up front."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from surogate.errors import BusyError

SHM = Path("/dev/shm")  # noqa: S108 - the memory file system; folders in it are private (0700)
PREFIX = "surogate-"
_LOCK = "lock"
_closers = ThreadPoolExecutor(1, thread_name_prefix="free-memory")
T = TypeVar("T")
NONCE_BYTES = 32


class MemoryDirectory:
    """A folder `<root>/surogate-<random>`, mode 0700, whose lock is held as long as this process lives.

    Making one removes those of dead processes first: whose lock can be had, nobody owns any more.
    """

    def __init__(self, root: Path = SHM) -> None:
        remove_stale(root)
        unnamed = root / f".{PREFIX}{secrets.token_hex(8)}"  # not taken for a stale one while it has no lock yet
        unnamed.mkdir(mode=0o700)
        self._lock = os.open(unnamed / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = unnamed.rename(root / unnamed.name.removeprefix("."))

    def close(self) -> None:
        """Removes the folder and all that is in it. May be repeated."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            os.close(self._lock)
        self._lock = -1


def remove_stale(root: Path = SHM) -> None:
    """Removes folders of processes that are gone. Those of other users, and of living processes, stay."""
    for folder in root.glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # not one of ours, or not our user's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)


class ImageFile:
    """A file of fixed length, all of whose memory is there from the start, so that writing cannot run out of it.

    It begins with a nonce, until it is written over. `drop` removes it at once, and closes it when its last user is
    done. Raises BusyError when there is no room.
    """

    def __init__(self, directory: Path, num_bytes: int) -> None:
        self.path = directory / f"{secrets.token_hex(8)}.safetensors"
        self.num_bytes = num_bytes
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._users = 1
        self._dropped = False
        try:
            _allocate(self.fd, num_bytes, directory)
        except BaseException:
            self.drop()
            raise
        self.nonce = secrets.token_bytes(min(NONCE_BYTES, num_bytes))
        self.write(0, self.nonce)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Writes all of `data`; the caller has checked that it fits."""
        view = memoryview(data)
        while view:
            count = os.pwrite(self.fd, view, offset)
            view, offset = view[count:], offset + count

    async def in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """Runs `function` in a thread. The file stays open until the thread is done, whether the file is dropped or the
        caller cancelled meanwhile: its number could belong to another file by then."""
        self._users += 1
        work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
        work.add_done_callback(self._thread_is_done)
        return await asyncio.shield(work)

    def drop(self) -> None:
        """Removes the file. May be repeated. Event loop only."""
        if self._dropped:
            return
        self._dropped = True
        self.path.unlink(missing_ok=True)
        self._leave()

    def _thread_is_done(self, work: asyncio.Future[T]) -> None:
        self._leave()
        if not work.cancelled():
            work.exception()  # seen, also if the caller is gone

    def _leave(self) -> None:
        self._users -= 1
        if self._users == 0:
            _closers.submit(os.close, self.fd)  # freeing a gigabyte takes a tenth of a second


def _allocate(fd: int, num_bytes: int, directory: Path) -> None:
    stats = os.statvfs(directory)
    free = stats.f_bavail * stats.f_frsize
    try:
        if num_bytes > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise BusyError(
            f"the weights need {num_bytes} bytes of memory, {free} are free: give {directory.parent} more room",
            retry_after=5.0,
            reason="NO_MEMORY",
        ) from error
