"""Which prompt comes next: unfinished draws of a run before this one first, then new ones."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from orchestrator_svc.grpo.configured.difficulty import Moves, Pool
from orchestrator_svc.grpo.groups import Draw
from orchestrator_svc.grpo.ledger import Ledger, OpenDraw
from orchestrator_svc.grpo.prompts.book import PromptBook
from orchestrator_svc.grpo.tasks import stop
from orchestrator_svc.jobstore.database import ANSWER_PATIENCE, StoreUnavailableError


class Drawer:
    """Draws prompts for steps; every draw is in the ledger before it is handed out."""

    def __init__(self, book: PromptBook, ledger: Ledger, *, first: int, unfinished: Sequence[OpenDraw] = ()) -> None:
        """`first` is the ordinal of the next new draw; `unfinished` are draws without an end, by ordinal."""
        self._book = book
        self._ledger = ledger
        self._next = first
        self._unfinished = list(unfinished)
        self._lost = False
        """Whether some that were drawn here may not be in the ledger."""

    async def take(self, step: int, count: int) -> list[Draw]:
        """Draws `count` prompts for a step, fewer when there are no more that may be drawn.

        Unfinished draws of that step, or of earlier ones, come first.

        Raises:
            StoreUnavailableError: The store is away, or was so when draws before these were given up.
        """
        if self._lost:
            raise StoreUnavailableError("the job store was away while prompts were drawn")
        again = [item for item in self._unfinished if item.step <= step][:count]
        taken = {item.ordinal for item in again}
        self._unfinished = [item for item in self._unfinished if item.ordinal not in taken]
        repeated = [Draw(item.ordinal, step, self._book.named(item.prompt)) for item in again]
        new, moves = self._fresh(step, count - len(again))
        if new or moves:
            await self._write_down(repeated, new, moves)
        return repeated + new

    async def _write_down(self, repeated: Sequence[Draw], new: Sequence[Draw], moves: Moves) -> None:
        """Writes new draws. Who is cancelled meanwhile gives them back when they are in the ledger."""
        writing = asyncio.ensure_future(self._ledger.draw(new, moves))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing}, timeout=ANSWER_PATIENCE)
            await stop([writing])
            if writing.cancelled() or writing.exception() is not None:
                self._lost = True
            self.give_back([*repeated, *new])
            raise

    def _fresh(self, step: int, count: int) -> tuple[list[Draw], Moves]:
        new: list[Draw] = []
        moves: dict[str, Pool | None] = {}
        for _ in range(count):
            moves |= self._book.pools.recycle(len(self._book.prompts), self._next)
            drawn = self._book.draw(self._next)
            if drawn is None:
                break
            new.append(Draw(self._next, step, drawn.prompt, drawn.deck, drawn.position))
            self._next += 1
        return new, moves

    def give_back(self, draws: Sequence[Draw]) -> None:
        """Takes draws that came to no end: they are drawn again, the same prompts."""
        again = [OpenDraw(draw.ordinal, draw.step, draw.prompt.key) for draw in draws]
        self._unfinished = sorted([*self._unfinished, *again], key=lambda item: item.ordinal)
