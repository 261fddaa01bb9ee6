"""Private folders and preallocated files in memory."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from surogate.errors import BusyError
from surogate.weights.memory import SHM, ImageFile, MemoryDirectory
from tests.helpers.waiting import until


def test_a_folder_is_private_and_goes_with_its_owner(tmp_path: Path) -> None:
    folder = MemoryDirectory(tmp_path)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_folders_of_dead_processes_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    program = "import sys, os; from pathlib import Path; from surogate.weights.memory import MemoryDirectory as M\n"
    program += "m = M(Path(sys.argv[1])); (m.path / 'x').touch(); os._exit(9)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    (left_over,) = tmp_path.iterdir()
    living = MemoryDirectory(tmp_path)
    other = MemoryDirectory(tmp_path)
    assert not left_over.exists()
    assert living.path.exists()
    living.close()
    other.close()


def test_no_room_is_told_before_a_byte_is_sent(tmp_path: Path) -> None:
    folder = MemoryDirectory(SHM)
    try:
        with pytest.raises(BusyError, match="bytes of memory") as caught:
            ImageFile(folder.path, 1 << 50)
        assert caught.value.reason == "NO_MEMORY"
        assert [path.name for path in folder.path.iterdir()] == ["lock"]
    finally:
        folder.close()


async def test_a_dropped_file_stays_open_for_the_thread_that_writes_to_it(tmp_path: Path) -> None:
    file = ImageFile(tmp_path, 100)
    go = threading.Event()

    def write() -> os.stat_result:
        go.wait(60)
        file.write(0, b"still there")
        return os.fstat(file.fd)

    writing = asyncio.create_task(file.in_thread(write))
    await asyncio.sleep(0)
    file.drop()
    assert not file.path.exists()
    go.set()
    assert (await writing).st_size == 100
    await until(lambda: not is_open(file.fd))


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError as error:
        assert error.errno == errno.EBADF
        return False
    return True
