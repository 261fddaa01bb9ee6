"""Reward services that are replaced while the job runs: what the store says the scorer uses, within a second."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from orchestrator_svc.grpo.configured.setup import service_security
from orchestrator_svc.grpo.rewards.scoring import Scorer
from orchestrator_svc.grpo.rewards.services import Custom
from orchestrator_svc.jobs.context import JobContext
from orchestrator_svc.jobstore.database import JOB_PATIENCE
from orchestrator_svc.jobstore.reward_services import MULTI_TURN, ReplacedService, replaced_services
from surogate.config.env import EnvConfig
from surogate.errors import SurogateError

POLL_SECONDS = 1.0


class Replacing:
    """Follows the store. Groups in flight finish on the service that they began with."""

    def __init__(self, ctx: JobContext, scorer: Scorer) -> None:
        self._ctx = ctx
        self._scorer = scorer
        self._known: Sequence[ReplacedService] = ()
        self._opened: list[Custom] = []
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Applies what was replaced before, and follows from then on."""
        if self._scorer.multi_turn != self._ctx.state.get(MULTI_TURN, []):
            await self._ctx.update(state={**self._ctx.state, MULTI_TURN: self._scorer.multi_turn})
        await self._look()
        self._task = asyncio.create_task(self._follow(), name="reward services")

    async def close(self) -> None:
        """Stops following, and closes the connections."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self._scorer.close_shadows()
        for endpoint in self._opened:
            await endpoint.close()

    async def _follow(self) -> None:
        while True:
            rung = self._ctx.bell.event(self._ctx.job_id)
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await rung.wait()
            try:
                await self._look()
            except SurogateError as error:  # the store is away, which the loop will notice by itself
                self._ctx.log.warning("cannot look for replaced reward services", error=str(error))

    async def _look(self) -> None:
        wanted = await self._ctx.database.read(lambda c: replaced_services(c, self._ctx.job_id), patience=JOB_PATIENCE)
        for gone in set(self._known) - set(wanted):
            if not any((new.environment, new.shadow) == (gone.environment, gone.shadow) for new in wanted):
                await self._apply(gone, None)
        for new in set(wanted) - set(self._known):
            await self._apply(new, self._open(new))
        self._known = wanted

    def _open(self, service: ReplacedService) -> Custom:
        env = EnvConfig(
            id=service.environment, address=service.address, tls=service.tls, token_env=service.token_env or None
        )
        endpoint = Custom(service.address, service_security(env, service.environment))
        self._opened.append(endpoint)
        return endpoint

    async def _apply(self, service: ReplacedService, endpoint: Custom | None) -> None:
        where = endpoint.name if endpoint else "the configured service"
        if service.shadow:
            await self._scorer.shadow(service.environment, endpoint)
            text = f"{where} scores {service.environment} as a shadow" if endpoint else "the shadow is gone"
        else:
            self._scorer.replace(service.environment, endpoint)
            text = f"{service.environment} is scored by {where} from now on"
        await self._ctx.notice(text, warning=False)
