"""Folders that are on disk whole, or not at all: after a crash there is nothing half-written under its name."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surogate.errors import SurogateError

TEMPORARY = ".tmp-"
"""Names of folders and files that are not complete begin so."""

RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers tell that the disk refused: by exceptions of their own, the number in the text."""


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` (and replaces what was there) when the block ends without error.

    All is on disk before the name is: after a crash there is either the whole folder or none. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with as_os_errors():
            yield temporary
        _open_to_readers(temporary)
        sync_tree(temporary)
        remove_folder(path)
        temporary.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def as_os_errors() -> Iterator[None]:
    """Inside, what libraries written in Rust tell of the disk by exceptions of their own is an OSError."""
    try:
        yield
    except Exception as error:
        refused = RUST_OS_ERROR.search(str(error))
        if refused is not None and not isinstance(error, OSError | SurogateError):
            raise OSError(int(refused[1]), str(error)) from error
        raise


def _open_to_readers(folder: Path) -> None:
    """Gives files the mode that any new file has: safetensors makes its own for their owner alone, and others serve."""
    usual = folder.stat().st_mode & 0o666
    for path in folder.rglob("*.safetensors"):
        path.chmod(usual)


def remove_folder(path: Path) -> None:
    """Deletes a folder so that a crash leaves no half of it under its name."""
    if not path.exists():
        return
    doomed = path.parent / f"{TEMPORARY}deleted-{path.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a crash left half-written."""
    for path in folder.glob(f"{TEMPORARY}*") if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def move_files(source: Path, target: Path) -> None:
    """Moves every file of one folder into another, each replacing its namesake at once."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        path.replace(target / path.name)
    sync(target)


def sync_tree(folder: Path) -> None:
    """Waits until a folder and all in it are on disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Waits until one file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
