"""A trainer session's event stream, in batches: what came while the last batch was being written comes together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from surogate.errors import UnavailableError
from surogate.v1 import trainer_pb2

_MAX_BATCH = 64


class EventBatches:
    """Iterates over lists of events, at least one in each, until the stream ends. Raises what the stream raises."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._queue: asyncio.Queue[trainer_pb2.SessionEvent | BaseException | None] = asyncio.Queue(_MAX_BATCH)
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EventBatches:
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def __aiter__(self) -> AsyncIterator[list[trainer_pb2.SessionEvent]]:
        while True:
            batch: list[trainer_pb2.SessionEvent] = []
            item = await self._queue.get()
            while isinstance(item, trainer_pb2.SessionEvent):
                batch.append(item)
                if len(batch) == _MAX_BATCH or self._queue.empty():
                    break
                item = self._queue.get_nowait()
            if batch:
                yield batch
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return

    async def _read(self) -> None:
        try:
            async for event in self._call:
                await self._queue.put(event)
            await self._queue.put(None)
        except asyncio.CancelledError:
            # The channel was closed under the call. If it is this task that is cancelled, nobody reads the queue.
            with suppress(asyncio.QueueFull):
                self._queue.put_nowait(UnavailableError("the connection to the trainer was closed"))
            raise
        except Exception as error:  # noqa: BLE001 - handed to the iterator, which raises it
            await self._queue.put(error)
