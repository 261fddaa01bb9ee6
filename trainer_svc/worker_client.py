"""The front's end of the connection to a worker; see worker_protocol.py for the other one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Callable

from surogate.errors import SurogateError
from surogate.internal.v1 import worker_pb2 as worker
from surogate.rpc.status import from_status
from trainer_svc.worker_protocol import HEADER, encode


class WorkerLostError(Exception):
    """The worker is of no use any more: it reported a fatal error or its connection closed. The session has failed."""


class WorkerSilentError(Exception):
    """The worker said nothing for longer than it may."""


class WorkerClient:
    """Sends commands and matches replies to them. Make one with `connect`."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_event: Callable[[worker.WorkerEvent], None],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._on_event = on_event
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[worker.WorkerReply | None]] = {}
        self._heard = 0.0
        self._closed = asyncio.Event()
        self.fatal: SurogateError | None = None
        """The error after which the worker gave up, once it reported one."""
        self._reading = asyncio.create_task(self._read(), name="worker messages")

    @classmethod
    async def connect(cls, sock: socket.socket, on_event: Callable[[worker.WorkerEvent], None]) -> WorkerClient:
        """Takes over the front's end of the socket pair."""
        reader, writer = await asyncio.open_connection(sock=sock)
        return cls(reader, writer, on_event)

    async def request(self, command: worker.WorkerCommand, *, silence: float) -> worker.WorkerReply:
        """Sends a command and waits for its reply.

        Raises the SurogateError that the worker refused it with, WorkerLostError if the worker cannot go on, and
        WorkerSilentError when nothing at all came from it for `silence` seconds.
        """
        if self._closed.is_set() or self.fatal is not None:
            raise WorkerLostError
        command.id = next(self._ids)
        reply: asyncio.Future[worker.WorkerReply | None] = asyncio.get_running_loop().create_future()
        self._pending[command.id] = reply
        try:
            self._writer.write(encode(command.SerializeToString()))
            await self._wait(reply, silence)
        finally:
            del self._pending[command.id]
        return _checked(reply.result())

    async def closed(self) -> None:
        """Waits until the worker closed its end and everything it said was read."""
        await self._closed.wait()

    async def close(self) -> None:
        """Closes the connection; commands in flight end with WorkerLostError."""
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading
        self._writer.close()

    async def _wait(self, reply: asyncio.Future[worker.WorkerReply | None], silence: float) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        while not reply.done():
            remaining = max(start, self._heard) + silence - loop.time()
            if remaining <= 0:
                raise WorkerSilentError
            await asyncio.wait({reply}, timeout=remaining)

    async def _read(self) -> None:
        try:
            while True:
                (length,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
                self._take(worker.WorkerMessage.FromString(await self._reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the worker is gone; what it was asked is answered below
        finally:
            self._closed.set()
            for reply in self._pending.values():
                if not reply.done():
                    reply.set_result(None)  # no exception: whoever asked may have left, and nobody would look at it

    def _take(self, message: worker.WorkerMessage) -> None:
        self._heard = asyncio.get_running_loop().time()
        if message.HasField("event"):
            self._on_event(message.event)
            return
        reply = message.reply
        if reply.fatal:
            self.fatal = from_status(reply.error)
        pending = self._pending.get(reply.id)
        if pending is not None and not pending.done():
            pending.set_result(reply)


def _checked(reply: worker.WorkerReply | None) -> worker.WorkerReply:
    if reply is None or reply.fatal:
        raise WorkerLostError
    if reply.HasField("error"):
        raise from_status(reply.error)
    return reply
