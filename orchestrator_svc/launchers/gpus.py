"""Sharing the GPUs of a machine between the workers of a job."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Assignment:
    """GPU names (indices or UUIDs) for CUDA_VISIBLE_DEVICES; empty leaves the variable as it is."""

    trainer: tuple[str, ...]
    inference: tuple[tuple[str, ...], ...]
    """One entry per replica."""


def assign(devices: Sequence[str], trainer: int, replicas: int, tp: int) -> Assignment:
    """Gives the trainer its GPUs and each replica `tp` others; where there are too few for that, workers share.

    Args:
        devices: GPUs of the machine.
        trainer: GPUs that the trainer asks for; 0 means all that the replicas leave.
        replicas: Number of inference replicas.
        tp: GPUs per replica.
    """
    names = tuple(devices)
    if len(names) <= 1 or replicas == 0:
        return Assignment(names[: trainer or None], (names,) * replicas)
    wanted = trainer or max(1, len(names) - replicas * tp)
    mine, rest = names[:wanted], names[wanted:]
    if len(rest) < tp:
        rest = names  # a replica cannot be split over fewer: it runs beside the trainer
    slots = max(1, len(rest) // tp)
    return Assignment(mine, tuple(rest[(i % slots) * tp : (i % slots) * tp + tp] for i in range(replicas)))


async def visible_devices(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """GPUs that this process may use; none where there is no driver."""
    if (named := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip() not in {"", "-1"})
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    process = await asyncio.create_subprocess_exec(
        program, "--query-gpu=index", "--format=csv,noheader", stdout=-1, stderr=-3, stdin=-3
    )
    try:
        async with asyncio.timeout(30):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        return ()
    return tuple(output.decode().split()) if process.returncode == 0 else ()
