"""What all workers have in common: an address, how to call it, and a channel to the incarnation that is up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator_svc.launchers.base import Component, Worker
from surogate.errors import UnavailableError
from surogate.rpc.channel import ClientSecurity, open_channel

if TYPE_CHECKING:
    import grpc.aio


class ConnectedWorker(Worker):
    """A worker at an address; empty while none is up. Who knows of its incarnations counts `_generation`."""

    def __init__(
        self, component: Component, index: int, security: ClientSecurity, *, address: str = "", generation: int = 0
    ) -> None:
        super().__init__(component, index)
        self._security = security
        self._address = address
        self._generation = generation
        self._channel: grpc.aio.Channel | None = None

    @property
    def address(self) -> str:
        return self._address

    @property
    def security(self) -> ClientSecurity:
        return self._security

    @property
    def generation(self) -> int:
        return self._generation

    async def channel(self) -> grpc.aio.Channel:
        if not self._address:
            raise UnavailableError(f"{self.name} is not up", reason="WORKER_DOWN")
        if self._channel is None:
            self._channel = open_channel(self._address, self._security)
        return self._channel
