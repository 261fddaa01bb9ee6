"""Reads what is new in a job's folder: steps, evaluations, rollouts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Tail:
    """The whole lines that were added to a file of JSON objects since the last look.

    A file that was replaced or has become shorter (a job resumed from an earlier step) is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._offset = 0

    def new_lines(self) -> Iterator[Line]:
        """Lines that have come; none while the file is not there."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            found = self._path.stat()
            if found.st_ino != self._inode or found.st_size < self._offset:
                self._inode, self._offset = found.st_ino, 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written
                self._offset += len(line)
                yield json.loads(line)
