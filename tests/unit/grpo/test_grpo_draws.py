"""Draws that are given up while they are being written down: they are drawn again if they are in the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from orchestrator_svc.grpo.configured.difficulty import Difficulty
from orchestrator_svc.grpo.groups import Draw
from orchestrator_svc.grpo.prompts.book import PromptBook
from orchestrator_svc.grpo.prompts.draws import Drawer
from orchestrator_svc.grpo.prompts.pools import Pools
from orchestrator_svc.jobstore.database import StoreUnavailableError
from tests.unit.grpo.test_grpo_book import A


class SlowLedger:
    """Writes draws when the test lets it, or fails then."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.asked = asyncio.Event()
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def draw(self, drawn: Sequence[Draw], _moves: object) -> None:
        self.asked.set()
        await self.answer
        self.written += [draw.ordinal for draw in drawn]


async def given_up(ledger: Any) -> tuple[Drawer, asyncio.Task[list[Draw]]]:
    """A drawer, and two draws of it that were cancelled while they were being written."""
    drawer = Drawer(PromptBook(A, 7, pools=Pools(Difficulty())), ledger, first=0)
    taking = asyncio.create_task(drawer.take(1, 2))
    await ledger.asked.wait()
    taking.cancel()
    await asyncio.sleep(0)
    assert not taking.done(), "it waits until it is known whether they were written"
    return drawer, taking


async def test_draws_that_were_written_are_drawn_again() -> None:
    ledger = SlowLedger()
    drawer, taking = await given_up(ledger)
    ledger.answer.set_result(None)
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert [draw.ordinal for draw in await drawer.take(1, 3)] == [0, 1, 2]
    assert ledger.written == [0, 1, 2]


async def test_a_job_whose_draws_may_be_nowhere_is_let_go_of() -> None:
    ledger = SlowLedger()
    drawer, taking = await given_up(ledger)
    ledger.answer.set_exception(StoreUnavailableError("the store is away"))
    with pytest.raises(asyncio.CancelledError):
        await taking
    with pytest.raises(StoreUnavailableError, match="away while prompts were drawn"):
        await drawer.take(1, 2)
