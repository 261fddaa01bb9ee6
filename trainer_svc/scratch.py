"""The trainer's folder in memory, in which weights wait to be pushed."""

from __future__ import annotations

import shutil
from pathlib import Path

from surogate.errors import ConfigError, Violation
from surogate.weights.memory import MemoryDirectory


class Scratch:
    """A folder of this process under `parent`, gone when the process is, however that ended.

    Raises ConfigError, which names the setting `scratch_dir`, where nothing can be written.
    """

    def __init__(self, parent: Path) -> None:
        try:
            self._folder = MemoryDirectory(parent)
        except OSError as error:
            reason = f"cannot write into {parent} ({error.strerror}): give the trainer a folder in memory that it owns"
            raise ConfigError.of([Violation("scratch_dir", reason)]) from error
        self.path = self._folder.path
        """The folder."""

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
        self._folder.close()
