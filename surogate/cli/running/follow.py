"""Follows a job to its end, over lost connections and restarted servers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from surogate.cli.running.display import Display
from surogate.cli.running.progress import Progress
from surogate.client.aio import AsyncClient
from surogate.errors import UnavailableError
from surogate.v1 import job_pb2


class Source(ABC):
    """Where the orchestrator is; a local one may have to be started again."""

    patience: float
    """Seconds that a watch tries to reach the server again by itself."""

    @abstractmethod
    async def client(self) -> AsyncClient:
        """The client of the orchestrator as it runs now."""

    @abstractmethod
    async def recover(self, error: UnavailableError) -> str:
        """Makes the orchestrator reachable again, and says in a line what was done; raises where it cannot."""


class Remote(Source):
    """An orchestrator that somebody else runs."""

    patience = 120.0

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def client(self) -> AsyncClient:
        """The one client."""
        return self._client

    async def recover(self, error: UnavailableError) -> str:
        """Nothing can be done from here."""
        raise error


async def follow_job(source: Source, name: str, progress: Progress, display: Display) -> job_pb2.Job:
    """Shows the events of a job until it has ended; returns it as it ended. Each event is shown once."""
    while True:
        client = await source.client()
        try:
            events = client.watch(name, after_sequence=progress.last_sequence, patience=source.patience)
            async for event in events:
                progress.apply(event)
                display.show(event, progress)
            return await client.get_job(name)
        except UnavailableError as error:
            display.say(await source.recover(error))


async def cancel_job(source: Source, name: str) -> None:
    """Asks for the job's end, over restarts of the orchestrator."""
    while True:
        client = await source.client()
        try:
            await client.cancel_job(name)
            return
        except UnavailableError as error:
            await source.recover(error)
