"""`python -m surogate.probe HOST:PORT [SERVICE]`: exit code 0 if a service reports SERVING, else 1.

For health checks of containers, where nothing else speaks gRPC. Security is that of every client (`SUROGATE_TLS_CA` …).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

_SECONDS = 5.0


async def _is_serving(target: str, service: str) -> bool:
    from surogate.rpc.channel import open_channel
    from surogate.rpc.health import is_serving

    async with open_channel(target) as channel:
        return await is_serving(channel, service, timeout=_SECONDS)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not 1 <= len(arguments) <= 2:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    target, service = [*arguments, ""][:2]
    return 0 if asyncio.run(_is_serving(target, service)) else 1


if __name__ == "__main__":
    sys.exit(main())
