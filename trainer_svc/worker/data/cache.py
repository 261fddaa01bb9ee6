"""The cache of encoded data: a folder for each combination of all that the tokens depend on.

Folders are made under a lock and appear whole, so that several runs, or several ranks of one, share them: the first one
writes, the others wait for it. What was not used for `UNUSED_DAYS` is deleted when something new is added.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from surogate.caches import VARIABLE, cache_root
from surogate.errors import DataLossError
from surogate.storage.whole import new_folder

META = "meta.json"
"""File that completes an entry: what is known of its content, and the sizes of its files."""

UNUSED_DAYS = 30
TOKENS = "tokens"

Build = Callable[[Path], Mapping[str, Any]]
"""Fills an empty folder and returns what is to be known of it."""


def key_of(parts: Mapping[str, Any]) -> str:
    """The name of the entry that depends on `parts`, which JSON must know how to write."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode())


def fetch(key: str, build: Build, *, root: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """The folder of an entry, and what is known of it; built first if it is not there, or not whole.

    Raises DataLossError when the disk refuses, and whatever `build` raises; nothing is left behind then.
    """
    root = root or cache_root(TOKENS)
    folder = root / key
    if (meta := _read(folder)) is not None:
        return folder, meta
    try:
        with _locked(root / f"{key}.lock"):
            if (meta := _read(folder)) is not None:
                return folder, meta
            _remove_unused(root)
            with new_folder(folder) as temporary:
                meta = dict(build(temporary))
                sizes = {str(file.relative_to(temporary)): file.stat().st_size for file in _files(temporary)}
                (temporary / META).write_text(json.dumps({**meta, "sizes": sizes}), encoding="utf-8")
            return folder, meta
    except OSError as error:
        if error.errno is None:
            raise  # one of ours, which says more
        raise DataLossError(
            f"the tokens could not be written to {root}: {error}; set {VARIABLE} to a folder with room"
        ) from error


def _read(folder: Path) -> dict[str, Any] | None:
    """What is known of an entry, which is marked as used; None if it is not there or not as it was written."""
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
        if any((folder / name).stat().st_size != size for name, size in meta["sizes"].items()):
            return None
    except (OSError, ValueError, KeyError):
        return None
    with suppress(OSError):  # a cache that may only be read is as good
        os.utime(folder / META)
    return meta


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock file while the block runs; the kernel lets go of it when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_unused(root: Path) -> None:
    """Deletes entries, and what a crash left of one, that were not used for long; who maps their files keeps them."""
    oldest = time.time() - UNUSED_DAYS * 86_400
    for folder in root.iterdir():
        with suppress(OSError):  # somebody else may delete it, too
            meta = folder / META
            if folder.is_dir() and (meta if meta.exists() else folder).stat().st_mtime < oldest:
                shutil.rmtree(folder)
                folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)
