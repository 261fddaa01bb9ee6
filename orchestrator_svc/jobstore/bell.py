"""Waking those who follow a job when its history grows."""

from __future__ import annotations

import asyncio


class Bell:
    """One event per job. Take it before reading the store, wait on it when there was nothing new: no ring is missed."""

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}

    def event(self, job_id: str) -> asyncio.Event:
        """The event that the next ring for the job sets."""
        return self._events.setdefault(job_id, asyncio.Event())

    def ring(self, job_id: str) -> None:
        """Wakes everybody who waits for the job."""
        event = self._events.pop(job_id, None)
        if event is not None:
            event.set()

    def ring_all(self) -> None:
        """Wakes everybody."""
        for job_id in list(self._events):
            self.ring(job_id)
