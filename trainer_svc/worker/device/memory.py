"""How the C library handles memory that a process frees: kept for the next step where a CPU trains, given back while a
model is read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's names of the options, in malloc.h."""

_LARGEST_KEPT = 1 << 30
"""Tensors of more bytes go back to the system when they are freed."""

_USUALLY_KEPT, _KEPT_IN_LOADING = 1 << 25, 1 << 17
"""The same where nothing asks for more (what glibc comes to by itself), and while a model is read."""


@cache
def keep_freed() -> bool:
    """Has this process keep what it frees from here on; false where the C library does not take such an option.

    Each step allocates what the one before it freed. What goes back to the system meanwhile comes again page by page,
    filled with zeros.
    """
    return _set(_MMAP_THRESHOLD, _LARGEST_KEPT) and _set(_TRIM_THRESHOLD, -1)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, tensors go back to the system when they are freed, where the C library can (glibc).

    glibc otherwise keeps those of up to 32 MB on its heap once the first one was freed, where what stays lies among
    what was freed and holds it fast.
    """
    _set(_MMAP_THRESHOLD, _KEPT_IN_LOADING)
    try:
        yield
    finally:
        _set(_MMAP_THRESHOLD, _LARGEST_KEPT if keep_freed.cache_info().currsize else _USUALLY_KEPT)


def _set(option: int, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(option, value))
