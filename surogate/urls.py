"""Names of things in an object store."""

from __future__ import annotations

PREFIX = "s3://"


def is_url(value: object) -> bool:
    """Whether a value names something in an object store rather than a path or a name on the hub."""
    return isinstance(value, str) and value.startswith(PREFIX)


def join(url: str, *names: str) -> str:
    """The URL, or the path, of something below another."""
    return "/".join([url.rstrip("/"), *names])
