"""Checkpoints in an object store (`checkpoint_dir: s3://…`), beside those in the output folder of this machine.

A checkpoint counts when the store has all of it: what a job is told is its URL, from which any machine goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from surogate.errors import DataLossError, SurogateError
from surogate.storage import folders
from surogate.storage.fetch import locked
from surogate.storage.objects import Objects
from surogate.urls import join
from trainer_svc.worker.folders.checkpoint_folders import Warn, kept, newest_good, step_in, verify

FINAL = "final"


@dataclass(frozen=True)
class Saved:
    """A checkpoint from which a job can go on."""

    step: int
    location: str
    """A folder of this machine, or a URL."""


class RemoteCheckpoints:
    """The folders `checkpoint-STEP` and `final` below a URL."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError that names the key if the store cannot be used."""
        self.url = url
        self._objects = Objects("train.checkpoint_dir")
        self.saved: Saved | None = None
        """The newest that this process has uploaded, or found."""

    def find(self) -> list[Saved]:
        """The complete ones, newest first."""
        names = folders.complete(self._objects, self.url)
        found = [Saved(step, join(self.url, name)) for name in names if (step := step_in(name)) is not None]
        return sorted(found, key=lambda saved: saved.step, reverse=True)

    def fetch(self, url: str, folder: Path) -> Path:
        """Downloads one into `folder`, unless a good copy is there. Raises DataLossError if it is not whole."""
        path = folder / url.rstrip("/").rpartition("/")[2]
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{path.name}.lock"):
            if not _is_good(path):
                folders.download(self._objects, url, path)
        return path

    def upload(self, folder: Path, step: int, *, limit: int, keep_interval: int) -> None:
        """Uploads a checkpoint, then deletes the oldest beyond `limit`, and what no resume would look at."""
        url = join(self.url, folder.name)
        folders.upload(self._objects, folder, url)
        self.saved = Saved(step, url)
        found = [saved.step for saved in self.find()]
        names = {item.name.partition("/")[0] for item in self._objects.items(self.url)}
        stay = kept(found, limit, step=step, keep_interval=keep_interval)
        doomed = [name for name in names if (number := step_in(name)) is not None and number not in stay]
        folders.remove(self._objects, self.url, doomed)

    def upload_final(self, output: Path, names: Iterable[str]) -> str:
        """Uploads the files of a final model or adapter; returns its URL."""
        url = join(self.url, FINAL)
        folders.upload(self._objects, output, url, names)
        return url


def newest(remote: RemoteCheckpoints, folder: Path, warn: Warn, *, alone: bool) -> str | None:
    """Where to go on from: the store's newest, or a newer one of this machine that could not be uploaded.

    `alone`: whether this process trains by itself; others might not see this machine's folder. Raises SurogateError if
    the store cannot be asked: starting anew would be worse.
    """
    found = remote.find()
    remote.saved = found[0] if found else None
    local = newest_good(folder, warn) if alone else None
    for saved in found:
        if local is not None and (step_in(local.name) or 0) >= saved.step:
            return str(local)
        try:
            remote.fetch(saved.location, folder)
        except DataLossError as error:
            warn(f"{error}; trying the one before it")
            continue
        return saved.location
    return str(local) if local is not None else None


def _is_good(path: Path) -> bool:
    try:
        verify(path)
    except SurogateError:
        return False
    return True
