"""Work in a thread of its own: what it returns and raises, and that nobody waits for it who has gone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from surogate.apart import apart
from surogate.telemetry import log

ENDLESS = """
import asyncio, threading
from surogate.apart import apart

async def main():
    work = asyncio.create_task(apart(threading.Event().wait))
    await asyncio.sleep(0.05)
    work.cancel()

asyncio.run(main())
"""


async def test_results_and_errors_come_back_and_the_context_goes_along() -> None:
    def fail() -> None:
        raise LookupError("not there")

    with log.bound(job="j"):
        assert await apart(lambda: log.current_context()["job"]) == "j"
    assert await apart(lambda: None) is None
    with pytest.raises(LookupError, match="not there"):
        await apart(fail)


async def test_what_hangs_takes_no_place_of_short_work() -> None:
    release = threading.Event()
    hanging = [asyncio.create_task(apart(release.wait)) for _ in range(100)]
    await asyncio.sleep(0)
    assert await asyncio.to_thread(lambda: "short") == "short"
    release.set()
    assert await asyncio.gather(*hanging) == [True] * 100


def test_a_process_ends_without_waiting_for_it() -> None:
    done = subprocess.run([sys.executable, "-c", ENDLESS], timeout=180, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
