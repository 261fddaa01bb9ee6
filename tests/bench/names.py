"""A DNS server on a loopback port for one name, whose addresses change as those of a headless Service do."""

from __future__ import annotations

import asyncio
import ipaddress
import struct
from collections.abc import Sequence
from typing import Any

_A = 1
_ANSWER = 0x8180
"""Flags: a response, recursion desired and available, no error."""


class Names(asyncio.DatagramProtocol):
    """Answers A questions, whatever the name, with `addresses` and no time to live; other questions with nothing."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = list(addresses)
        self.port = 0
        self._transport: Any = None

    @classmethod
    async def serving(cls, addresses: Sequence[str]) -> Names:
        """A server that listens; `close` it."""
        made = cls(addresses)
        await asyncio.get_running_loop().create_datagram_endpoint(lambda: made, ("127.0.0.1", 0))
        return made

    def close(self) -> None:
        """Listens no longer."""
        self._transport.close()

    def connection_made(self, transport: Any) -> None:
        """Called by asyncio."""
        self._transport = transport
        self.port = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, addr: Any) -> None:
        """Called by asyncio."""
        question = data[12 : data.index(b"\0", 12) + 5]
        (kind,) = struct.unpack(">H", question[-4:-2])
        found = self.addresses if kind == _A else []
        header = data[:2] + struct.pack(">5H", _ANSWER, 1, len(found), 0, 0)
        answers = [b"\xc0\x0c" + struct.pack(">HHIH", _A, 1, 0, 4) + ipaddress.ip_address(one).packed for one in found]
        self._transport.sendto(header + question + b"".join(answers), addr)
