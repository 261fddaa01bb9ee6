"""HOST:PORT strings: taking them apart and putting them together, IPv6 included."""

from __future__ import annotations

from surogate.errors import InvalidInputError

_SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "xds:")
"""Of gRPC targets, which are taken as they are."""
_WILDCARDS = frozenset({"0.0.0.0", "::", "*"})  # noqa: S104 - recognised here, not bound


def split(address: str) -> tuple[str, int]:
    """`("::1", 80)` of `[::1]:80`. Raises ValueError for what is not HOST:PORT."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def check_target(target: str) -> None:
    """Raises InvalidInputError for a target that is neither HOST:PORT nor one of gRPC's own forms."""
    if target.startswith(_SCHEMES):
        return
    try:
        host, port = split(target)
    except ValueError:
        host, port = "", 0
    if not host or "/" in host or not 0 < port < 65536:
        raise InvalidInputError(f"{target!r} is not HOST:PORT, as in 127.0.0.1:50051", reason="NO_ADDRESS")


def join(host: str, port: int) -> str:
    """`[::1]:80` of `("::1", 80)`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reachable(address: str, port: int) -> str:
    """The address at which a server that listens on `address` is reached from its own host, with its real port."""
    host, _ = split(address)
    if host in _WILDCARDS:
        host = "::1" if host == "::" else "127.0.0.1"
    return join(host, port)


def is_loopback(target: str) -> bool:
    """Whether bytes sent to a gRPC target stay on this host."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    try:
        host, _ = split(target.rpartition("/")[2])
    except ValueError:
        host = target
    return host in {"localhost", "::1"} or host.startswith("127.")
