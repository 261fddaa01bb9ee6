"""Programs of a benchmark: each in a process of its own, so that it starts with nothing in memory."""

from __future__ import annotations

import asyncio
import sys

from surogate.process import child_environment

ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
"""Threads wait as those of our services do, in what is compared with them too: all fare better so."""


async def last_line(module: str, *flags: str, seconds: float) -> str:
    """Runs a module, and returns the last line that it prints. Raises TimeoutError, and AssertionError if it fails."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *flags), env=child_environment(ENVIRONMENT), stdout=asyncio.subprocess.PIPE
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), seconds)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, f"{module} failed; its messages are above"
    return out.decode().splitlines()[-1]
