"""The loop in a thread of its own on which async scorers run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextvars import ContextVar

import pytest

from surogate.errors import DeadlineError
from surogate.reward.lane import Lane

_LONG = 60.0
_said: ContextVar[str] = ContextVar("said", default="nothing")


@pytest.fixture
def lane() -> Iterator[Lane]:
    made = Lane()
    yield made
    made.close()


class Hanging:
    """A scorer that waits until it is cancelled."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()

    async def __call__(self) -> float:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return 1.0


async def test_what_a_scorer_returns_or_raises_comes_back(lane: Lane) -> None:
    async def where() -> tuple[int, str]:
        return threading.get_ident(), _said.get()

    async def wrong() -> float:
        raise ValueError("no")

    _said.set("this")
    thread, said = await lane.call(where).result(_LONG)  # type: ignore[misc]  # an object to the lane
    assert thread != threading.get_ident() and said == "this"
    call = lane.call(wrong)
    with pytest.raises(ValueError, match="no"):
        await call.result(_LONG)
    assert await call.settled(_LONG) and not call.alive


async def test_a_timeout_of_the_scorers_own_is_its_error(lane: Lane) -> None:
    async def gives_up() -> float:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await lane.call(gives_up).result(_LONG)


async def test_a_late_scorer_is_cancelled_and_settles(lane: Lane) -> None:
    hanging = Hanging()
    call = lane.call(hanging)
    with pytest.raises(DeadlineError, match="item_timeout"):
        await call.result(0.05)
    assert await call.settled(_LONG) and not call.alive


async def test_a_scorer_ends_with_whoever_waited_for_it(lane: Lane) -> None:
    hanging = Hanging()
    task = asyncio.create_task(lane.call(hanging).result(_LONG))
    assert await asyncio.to_thread(hanging.begun.wait, _LONG)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(hanging.cancelled.wait, _LONG)


async def test_a_scorer_that_blocks_the_lane_is_alive_until_it_ends(lane: Lane) -> None:
    go_on = threading.Event()

    async def blocks() -> float:
        go_on.wait(_LONG)
        return 1.0

    call = lane.call(blocks)
    with pytest.raises(DeadlineError):
        await call.result(0.05)
    assert not await call.settled(0.05) and call.alive
    go_on.set()
    assert await call.settled(_LONG) and not call.alive
