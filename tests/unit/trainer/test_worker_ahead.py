"""Reading ahead changes when data is read, and nothing else."""

from __future__ import annotations

import threading

import pytest
import torch

from trainer_svc.worker.data.ahead import ReadAhead, num_threads


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_every_step_gets_its_own_data_once_and_nothing_is_read_beyond_the_end(threads: int) -> None:
    read: list[int] = []
    ahead = ReadAhead(lambda step: read.append(step) or step * 10, end=7, threads=threads)
    assert [ahead.of(step) for step in range(2, 7)] == [20, 30, 40, 50, 60]
    assert sorted(read) == [2, 3, 4, 5, 6]
    ahead.close()


def test_the_next_steps_are_read_while_one_trains() -> None:
    third = threading.Event()
    ahead = ReadAhead(lambda step: third.set() if step == 2 else None, end=10, threads=2)
    ahead.of(0)
    assert third.wait(10)
    ahead.close()


def test_what_goes_wrong_is_told_at_its_step() -> None:
    def read(step: int) -> int:
        if step == 1:
            raise OSError("the disk is gone")
        return step

    ahead = ReadAhead(read, end=3, threads=1)
    assert ahead.of(0) == 0
    with pytest.raises(OSError, match="disk"):
        ahead.of(1)
    ahead.close()


def test_a_cpu_keeps_its_cores_unless_told_otherwise() -> None:
    assert num_threads("auto", torch.device("cpu")) == 0
    assert num_threads("auto", torch.device("cuda")) > 0
    assert num_threads(4, torch.device("cpu")) == 4
