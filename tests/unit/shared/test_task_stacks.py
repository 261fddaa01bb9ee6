"""What the report of a failed test says of asyncio's tasks."""

from __future__ import annotations

import asyncio

from tests.helpers.task_stacks import MOST_TASKS, waiting_tasks


async def outer(event: asyncio.Event) -> None:
    await inner(event)


async def inner(event: asyncio.Event) -> None:
    await event.wait()


async def test_each_task_is_told_with_the_lines_at_which_it_waits() -> None:
    event = asyncio.Event()
    task = asyncio.create_task(outer(event), name="stuck")
    await asyncio.sleep(0)
    told = waiting_tasks()
    event.set()
    await task
    lines = told[told.index("stuck: outer") :].splitlines()
    assert lines[1].endswith(": await inner(event)")
    assert lines[2].endswith(": await event.wait()")
    later = waiting_tasks()
    assert "stuck" not in later


async def test_of_very_many_tasks_the_first_are_told() -> None:
    event = asyncio.Event()
    tasks = [asyncio.create_task(event.wait()) for _ in range(MOST_TASKS + 6)]
    told = waiting_tasks()
    event.set()
    await asyncio.gather(*tasks)
    assert told.endswith("and 7 more tasks"), "this test is a task too"
