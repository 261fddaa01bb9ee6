"""Progress bars of the engine's process leave no semaphore behind, however that process ends."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from inference_svc.plugin import lock_bars_by_thread

pytest.importorskip("tqdm")


def _draw(answer: Connection, locked: bool) -> None:
    """Draws a bar, as vLLM does while it reads weights, and tells which semaphores the process has."""
    from tqdm.auto import tqdm

    if locked:
        lock_bars_by_thread()
    list(tqdm(range(2), disable=False))
    answer.send([line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/sem." in line])


@pytest.mark.parametrize("locked", [True, False])
def test_a_bar_makes_no_semaphore_where_its_lock_is_of_one_process(locked: bool) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_draw, args=(there, locked))
    process.start()
    there.close()
    semaphores = here.recv()
    process.join()
    assert not process.exitcode
    assert len(semaphores) == (0 if locked else 1), "and without it there is one"
