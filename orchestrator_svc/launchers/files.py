"""Following a log file as it grows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from surogate.process import last_lines

_PAUSE = 0.25
_LONGEST_TAIL = 4 << 20
_PIECE = 1 << 16


async def follow_file(file: Path, tail: int, ended: Callable[[], bool]) -> AsyncGenerator[str, None]:
    """The last lines of a file, and new ones until `ended()`; what was written by then still comes."""
    rest, position = b"", await asyncio.to_thread(_size, file)
    for old in (await asyncio.to_thread(last_lines, file, tail, _LONGEST_TAIL)).splitlines():
        yield old
    while True:
        last = ended()
        piece = await asyncio.to_thread(_read, file, position)
        position += len(piece)
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
        if last and not piece:
            if rest:
                yield rest.decode(errors="replace")
            return
        if not piece:
            await asyncio.sleep(_PAUSE)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _read(file: Path, position: int) -> bytes:
    try:
        with file.open("rb") as source:
            source.seek(position)
            return source.read(_PIECE)
    except FileNotFoundError:
        return b""
