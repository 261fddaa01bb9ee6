"""Which phases of a quickstart are done, so that the same command goes on after it was interrupted."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

STATE = "quickstart.json"
MADE = ("base", "pt", "sft", "grpo", "text.jsonl", "reverse-text.jsonl", "summary.json", "summary.md", STATE)
"""All that a quickstart writes into its folder; nothing else is ever removed."""


class Progress:
    """The record of a folder: seconds of each phase that is done."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.seconds: dict[str, float] = {}

    def done(self, phase: str) -> bool:
        """Whether the phase was finished by this run or the one that it goes on with."""
        return phase in self.seconds

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Times a phase, and writes down that it is done if the block ends without an exception."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start
        part = self.folder / f".{STATE}.part"
        part.write_text(json.dumps({"fingerprint": self.fingerprint, "seconds": self.seconds}, indent=2) + "\n")
        part.replace(self.folder / STATE)


def open_progress(folder: Path, fingerprint: str, phases: Sequence[str]) -> Progress:
    """The folder's record. An unfinished run of the same fingerprint goes on; any other is removed and starts over."""
    progress = Progress(folder, fingerprint)
    recorded = _read(folder / STATE)
    if recorded.get("fingerprint") == fingerprint and set(recorded["seconds"]) < set(phases):
        progress.seconds = dict(recorded["seconds"])
        return progress
    if not recorded and any((folder / name).exists() for name in MADE):
        raise FileExistsError(f"{folder} has files that no quickstart has finished making; remove it, or name another")
    for name in MADE:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with progress.phase("begin"):
        pass
    return progress


def fingerprint(files: Sequence[Path], *settings: object) -> str:
    """Changes when a file or a setting does: what was made with others must not be gone on with."""
    digest = hashlib.sha256(repr(settings).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found
