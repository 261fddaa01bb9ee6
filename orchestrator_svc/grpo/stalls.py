"""What a job waits for while it does not train, in its status; the time to the end is not known then."""

from __future__ import annotations

from contextlib import suppress

from orchestrator_svc.jobs.context import JobContext
from surogate.errors import SurogateError


class Stalls:
    """Says "waiting for …" while something is away, and what is being done when all is back."""

    def __init__(self, ctx: JobContext | None = None) -> None:
        """Without a job nothing is said."""
        self._ctx = ctx
        self._away: dict[str, str] = {}

    async def begin(self, what: str, why: str) -> None:
        """`what` ("the trainer") is away, `why` being what is known of it."""
        if what not in self._away:
            self._away[what] = why
            await self._say()

    async def end(self, what: str) -> None:
        """It is back. Harmless where it was not away."""
        if self._away.pop(what, None) is not None:
            await self._say()

    async def _say(self) -> None:
        ctx = self._ctx
        if ctx is None or not ctx.is_training or ctx.cancelled.is_set():
            return  # before training begins, and after its end, the job says itself what it waits for
        with suppress(SurogateError):  # a store that is away must not keep what comes back from coming back
            if self._away:
                await ctx.stalled("; ".join(f"waiting for {what}: {why}" for what, why in self._away.items()))
            else:
                await ctx.goes_on()
