"""What is wrong with the files of a model's folder: looked for when it could not be loaded.

Libraries tell of a damaged file in words of their own, mostly without its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

_POINTER = b"version https://git-lfs"
_TORCH = (b"PK", b"\x80")
"""What files of `torch.save` begin with: those of today, and those of before torch 1.6."""

_AGAIN = "download the model again"


def damage(folder: Path) -> str | None:
    """The first file that is not what its name says, or is not there, in words; None if all look well."""
    return next(_damages(folder), None) if folder.is_dir() else None


def _damages(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            yield f"{path} is a link to {path.readlink()}, which is not there; {_AGAIN}"
        elif path.is_file() and (wrong := _wrong_with(path)) is not None:
            yield f"{path} {wrong}"
    for path in sorted(folder.glob("*.index.json")):
        for name in sorted(set(json.loads(path.read_text(encoding="utf-8")).get("weight_map", {}).values())):
            if not (folder / name).is_file():
                yield f"{path} names {name}, which is not there; {_AGAIN}"


def _wrong_with(path: Path) -> str | None:
    look = _LOOKS.get(path.suffix)
    if look is None:
        return None
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
        if not start:
            return f"is empty; {_AGAIN}"
        if start == _POINTER:
            return "is a pointer of Git LFS and not the file itself: run `git lfs pull` in the folder"
        return look(path, start)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _json(path: Path, _: bytes) -> str | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"is not JSON: {error}"
    return None if isinstance(found, dict) else "is not a JSON object"


def _safetensors(path: Path, _: bytes) -> str | None:
    try:
        with safe_open(path, "pt"):
            return None
    except SafetensorError as error:
        return f"is damaged ({error}); {_AGAIN}"


def _torch(_: Path, start: bytes) -> str | None:
    return None if start.startswith(_TORCH) else f"is not a file of torch.save; {_AGAIN}"


_LOOKS: dict[str, Callable[[Path, bytes], str | None]] = {
    ".json": _json,
    ".safetensors": _safetensors,
    ".bin": _torch,
}
"""What is wrong with a file that begins with these bytes, by its name's end."""
