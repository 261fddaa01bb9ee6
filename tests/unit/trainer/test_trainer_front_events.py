"""A session's history: numbered, bounded, watched by several."""

from __future__ import annotations

import asyncio

import pytest

from surogate.errors import OutOfRangeError
from surogate.v1 import trainer_pb2 as trainer
from trainer_svc.events import EventLog


def step(number: int) -> trainer.SessionEvent:
    return trainer.SessionEvent(step=trainer.TrainerStep(step=number))


async def steps_after(log: EventLog, sequence: int) -> list[int]:
    return [event.step.step async for event in log.watch(sequence)]


async def test_a_watch_gets_what_was_and_what_comes() -> None:
    log = EventLog()
    log.add(step(1))
    watching = asyncio.create_task(steps_after(log, 0))
    await asyncio.sleep(0)
    log.add(step(2))
    log.close()
    assert await watching == [1, 2]


async def test_the_oldest_events_are_forgotten_first() -> None:
    log = EventLog(max_events=3)
    for number in range(1, 11):
        log.add(step(number))
    log.close()
    assert await steps_after(log, 0) == [8, 9, 10]
    assert await steps_after(log, 9) == [10]
    assert [event.sequence async for event in log.watch(0)] == [8, 9, 10]


async def test_a_slow_watcher_misses_only_what_was_forgotten() -> None:
    log = EventLog(max_events=3)
    log.add(step(1))
    watch = log.watch(0)
    assert (await anext(watch)).step.step == 1
    for number in range(2, 10):
        log.add(step(number))
    log.close()
    assert [event.step.step async for event in watch] == [7, 8, 9]


async def test_many_events_arrive_in_order() -> None:
    log = EventLog()
    for number in range(1, 2001):
        log.add(step(number))
    log.close()
    assert await steps_after(log, 0) == list(range(1, 2001))


async def test_events_carry_their_time_and_number() -> None:
    log = EventLog()
    log.add(step(1))
    event = await anext(log.watch(0))
    assert event.sequence == 1
    assert event.time.seconds > 0


async def test_a_sequence_that_is_still_to_come_is_refused() -> None:
    with pytest.raises(OutOfRangeError, match="watch from 0"):
        await anext(EventLog().watch(1))
