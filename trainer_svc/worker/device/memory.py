"""How the C library handles memory that a process frees: kept for the next step, where a CPU trains."""

from __future__ import annotations

import ctypes
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's names of the options, in malloc.h."""

_LARGEST_KEPT = 1 << 30
"""Tensors of more bytes go back to the system when they are freed."""


@cache
def keep_freed() -> bool:
    """Has this process keep what it frees from here on; false where the C library does not take such an option.

    Each step allocates what the one before it freed. What goes back to the system meanwhile comes again page by page,
    filled with zeros.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    return option is not None and bool(option(_MMAP_THRESHOLD, _LARGEST_KEPT) and option(_TRIM_THRESHOLD, -1))
