"""A connection that follows the client's certificates when they are renewed: gRPC itself reads them once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc

from surogate.errors import ConfigError
from surogate.rpc.security import ClientSecurity
from surogate.telemetry.log import get_logger

_GRACE_SECONDS = 7200.0
"""Time that calls in flight on a connection with old certificates may take to finish."""

_log = get_logger("rpc")


class RenewingChannel:
    """`current` is a channel with the certificates that the files have now; what began on another goes on there."""

    def __init__(self, connect: Callable[[], grpc.aio.Channel], security: ClientSecurity) -> None:
        self._connect = connect
        self._security = security
        self._stamp = security.stamp()
        self._channel = connect()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def current(self) -> grpc.aio.Channel:
        """The channel for the next call. Files that cannot be used (yet) leave the one that there is."""
        stamp = self._security.stamp()
        if stamp is None or stamp == self._stamp:
            return self._channel
        self._stamp = stamp
        try:
            self._security.check()
            renewed = self._connect()
        except ConfigError as error:
            _log.warning("renewed TLS files cannot be used; those loaded before stay", error=str(error))
            return self._channel
        task = asyncio.get_running_loop().create_task(self._channel.close(_GRACE_SECONDS))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        self._channel = renewed
        return renewed

    async def close(self, grace: float | None) -> None:
        """Closes all connections."""
        for task in self._closing:
            task.cancel()
        await self._channel.close(grace)
