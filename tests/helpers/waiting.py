"""Waiting for what has no event: until it is so, never for a time after which it should be."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

PATIENCE = 120.0
"""Seconds after which what a test waits for is not coming, on the slowest and busiest machine."""


async def until(met: Callable[[], Any]) -> Any:
    """Waits until `met()`, or what it returned once awaited, is true, and returns that. Raises TimeoutError."""
    async with asyncio.timeout(PATIENCE):
        while True:
            found = met()
            if inspect.isawaitable(found):
                found = await found
            if found:
                return found
            await asyncio.sleep(0.02)
