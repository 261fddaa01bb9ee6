"""The circuit breaker before a reward service."""

from __future__ import annotations

import asyncio
import time

import pytest

from orchestrator_svc.grpo.rewards import breaker as module
from orchestrator_svc.grpo.rewards.breaker import TRIPS_AFTER, Breaker
from surogate.errors import UnavailableError
from tests.helpers.waiting import until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.02)


async def test_callers_go_one_at_a_time_while_it_is_open_and_all_at_once_again_after_a_success() -> None:
    breaker, inside, most, calls, healthy = Breaker(), 0, 0, 0, False

    async def call() -> None:
        nonlocal inside, most, calls
        while True:
            async with breaker.attempt(time.monotonic() + 60):
                inside, calls = inside + 1, calls + 1
                most = max(most, inside) if breaker.is_open else most
                await asyncio.sleep(0)
                inside -= 1
                if healthy:
                    breaker.succeeded()
                    return
                breaker.failed()

    for _ in range(TRIPS_AFTER):
        breaker.failed()
    callers = [asyncio.create_task(call()) for _ in range(8)]
    await until(lambda: calls >= 20)
    assert breaker.is_open
    assert most == 1
    healthy = True
    await asyncio.gather(*callers)
    assert not breaker.is_open


async def test_a_caller_gives_up_when_its_time_is_over() -> None:
    breaker = Breaker()
    for _ in range(TRIPS_AFTER):
        breaker.failed()
    with pytest.raises(UnavailableError, match="3 times in a row"):
        async with breaker.attempt(time.monotonic()):
            pytest.fail("it had no time for an attempt")
