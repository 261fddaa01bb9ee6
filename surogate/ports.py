"""Ports of the loopback interface for servers that are told theirs before they listen."""

from __future__ import annotations

import secrets
import socket

from surogate.errors import UnavailableError

_FIRST, _COUNT = 20_000, 10_000
"""Below the ports that Linux gives to connections by itself (32768 and more): one of those might be some connection's
by the time that the server has loaded what it needs, or while it is restarted."""
_ATTEMPTS = 200


def free_port() -> int:
    """A TCP port that nobody has. Raises UnavailableError if none is found."""
    for _ in range(_ATTEMPTS):
        port = _FIRST + secrets.randbelow(_COUNT)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise UnavailableError(f"none of {_ATTEMPTS} ports from {_FIRST} to {_FIRST + _COUNT - 1} is free on this machine")
