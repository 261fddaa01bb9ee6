"""Folders of files in an object store that are complete or cannot be seen: a marker is written last, and goes first."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from surogate.errors import DataLossError
from surogate.storage.fetch import write_folder
from surogate.storage.objects import Objects
from surogate.urls import join

MARKER = "COMPLETE.json"
"""Says which files the folder has, with their sizes and checksums (XXH3)."""
_AT_ONCE = 8


def upload(objects: Objects, folder: Path, url: str, only: Iterable[str] | None = None) -> None:
    """Uploads a folder, or the files of it that `only` names. A repeat begins anew.

    Until all of it is there, `complete` does not show it.

    Raises StorageError or ConfigError; see `Objects`.
    """
    objects.delete([join(url, MARKER)] if objects.read(join(url, MARKER)) is not None else [])
    every = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = sorted(every if only is None else only)
    files = [folder / name for name in names]
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="upload") as pool:
        listed = dict(zip(names, pool.map(fingerprint, files), strict=True))
        list(pool.map(lambda path, name: objects.put(path, join(url, name)), files, names))
    objects.write(join(url, MARKER), json.dumps(listed, indent=2).encode())


def complete(objects: Objects, url: str) -> list[str]:
    """Names of the complete folders right below a prefix."""
    names = {item.name for item in objects.items(url)}
    return sorted(name.removesuffix(f"/{MARKER}") for name in names if name.count("/") == 1 and name.endswith(MARKER))


def download(objects: Objects, url: str, folder: Path) -> None:
    """Downloads a complete folder; `folder` appears when all of it is there and is what was uploaded.

    Raises DataLossError if it is not complete, or a file is not what was uploaded; StorageError or ConfigError.
    """
    marker = objects.read(join(url, MARKER))
    if marker is None:
        raise DataLossError(f"{url} is not complete", reason="CHECKPOINT_DAMAGED")
    listed = json.loads(marker)

    def fill(part: Path) -> None:
        def one(name: str) -> None:
            objects.get(join(url, name), part / name)
            if fingerprint(part / name) != listed[name]:
                raise DataLossError(f"{url} is damaged: {name} is not what was uploaded", reason="CHECKPOINT_DAMAGED")

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="download") as pool:
            list(pool.map(one, listed))

    write_folder(folder, fill)


def remove(objects: Objects, url: str, names: Iterable[str]) -> None:
    """Deletes folders below a prefix, each one's marker first: a half-deleted one is not seen either."""
    for name in names:
        folder = join(url, name)
        if objects.read(join(folder, MARKER)) is not None:
            objects.delete([join(folder, MARKER)])
        objects.delete([join(folder, item.name) for item in objects.items(folder)])


def fingerprint(path: Path) -> list[int | str]:
    """Size and checksum of a file."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]
