"""A TCP proxy that delays and cuts connections, to see what a slow or broken network does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from surogate.rpc import address


class CuttingProxy:
    """Forwards to `target`, each connection after `delay` seconds. Connections made while `budget` is not None are cut
    once that many bytes went through."""

    def __init__(self, target: str, delay: float) -> None:
        self._target = address.split(target)
        self._delay = delay
        self.budget: int | None = None
        self.cuts = 0
        self.address = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self._delay)
        upstream_reader, upstream_writer = await asyncio.open_connection(*self._target)
        tasks = {
            asyncio.create_task(self._pump(reader, upstream_writer, counted=True)),
            asyncio.create_task(self._pump(upstream_reader, writer, counted=False)),
        }
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for end in (writer, upstream_writer):
            end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
                if counted and self._spent(len(data)):
                    return
        except ConnectionError:
            return

    def _spent(self, count: int) -> bool:
        if self.budget is None:
            return False
        self.budget -= count
        if self.budget > 0:
            return False
        self.budget = None
        self.cuts += 1
        return True


@asynccontextmanager
async def cutting(target: str, delay: float = 0.0) -> AsyncIterator[CuttingProxy]:
    """A running proxy to `target`, on a free port."""
    proxy = CuttingProxy(target, delay)
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0)
    proxy.address = address.join("127.0.0.1", server.sockets[0].getsockname()[1])
    try:
        yield proxy
    finally:
        server.close()
