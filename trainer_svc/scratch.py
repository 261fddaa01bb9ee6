"""A folder in memory that is gone when its process is, however that ended."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from pathlib import Path

from surogate.errors import ConfigError, Violation

PREFIX = "surogate-trainer-"
_LOCK = "lock"


class Scratch:
    """A folder of this process under `parent`, locked for as long as the process lives.

    Making one also removes the folders of processes that were killed: those whose lock nobody holds.

    Raises ConfigError, which names the setting `scratch_dir`, where nothing can be written.
    """

    def __init__(self, parent: Path) -> None:
        _remove_abandoned(parent)
        self.path = parent / f"{PREFIX}{uuid.uuid4().hex[:12]}"
        """The folder."""
        staging = parent / f".{self.path.name}"  # appears under its name only once it is locked
        try:
            staging.mkdir(mode=0o700)
        except OSError as error:
            reason = f"cannot write into {parent} ({error.strerror}): give the trainer a folder in memory that it owns"
            raise ConfigError.of([Violation("scratch_dir", reason)]) from error
        self._lock = os.open(staging / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        staging.rename(self.path)

    def subfolder(self, name: str) -> Path:
        """Makes an empty folder in it."""
        self.remove(name)
        folder = self.path / name
        folder.mkdir()
        return folder

    def remove(self, name: str) -> None:
        """Removes a folder in it."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # another user's, or just being removed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)
