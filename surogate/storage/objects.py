"""Objects by URL, `s3://BUCKET/KEY`: listing, reading, writing and deleting them, tried again when the store is away.

Credentials, region and endpoint are those of every S3 client: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
`AWS_DEFAULT_REGION`, `AWS_ENDPOINT_URL`, profiles, and the roles of a pod.
"""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from surogate.errors import ConfigError, UnavailableError, Violation
from surogate.telemetry.log import get_logger
from surogate.urls import PREFIX

ATTEMPTS = 6
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; doubles, up to `MAX_PAUSE`."""
MAX_PAUSE = 16.0
_SETTINGS = {"connect_timeout": 10, "read_timeout": 60, "retries": {"total_max_attempts": 1}}

T = TypeVar("T")
_log = get_logger("storage")


class StorageError(UnavailableError):
    """The object store does not answer, or refuses for a reason that may pass."""

    reason = "OBJECT_STORE_UNAVAILABLE"


@dataclass(frozen=True)
class Item:
    """An object below a prefix."""

    name: str
    """Its key, from the prefix on."""
    size: int
    etag: str
    """Changes with the content: what was fetched before is another copy then."""


class Objects:
    """The object store as one key of a configuration names it: errors that the user can mend name that key.

    Methods raise ConfigError for what will not mend itself (no such bucket, no access, no library) and StorageError
    when the store was away for all attempts.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._store: Any = _filesystem(key)

    def items(self, url: str) -> list[Item]:
        """The objects below a prefix, or the one of that name (its `name` is empty then), in order."""
        root = url.removeprefix(PREFIX).rstrip("/")
        found = self._tried(lambda: self._store.find(root, detail=True), f"cannot list {url}")
        inside = {path: info for path, info in found.items() if path == root or path.startswith(f"{root}/")}
        return [
            Item(path[len(root) + 1 :], int(info["size"]), str(info.get("ETag", "")))
            for path, info in sorted(inside.items())
        ]

    def read(self, url: str) -> bytes | None:
        """The content of a small object; None if there is none."""

        def read() -> bytes | None:
            try:
                return bytes(self._store.cat_file(url))
            except FileNotFoundError:
                return None

        return self._tried(read, f"cannot read {url}")

    def write(self, url: str, content: bytes) -> None:
        """Writes a small object."""
        self._tried(lambda: self._store.pipe_file(url, content), f"cannot write {url}")

    def get(self, url: str, path: Path) -> None:
        """Downloads an object into a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._tried(lambda: self._store.get_file(url, str(path)), f"cannot read {url}")

    def put(self, path: Path, url: str) -> None:
        """Uploads a file. An object appears whole or not at all."""
        self._tried(lambda: self._store.put_file(str(path), url), f"cannot write {url}")

    def delete(self, urls: list[str]) -> None:
        """Deletes objects; those that are not there are no error."""
        if urls:
            self._tried(lambda: self._store.rm([url.removeprefix(PREFIX) for url in urls]), f"cannot delete {urls[0]}")

    def _tried(self, call: Callable[[], T], what: str) -> T:
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except PermissionError as error:
                raise self._wrong(f"{what}: access is denied; check the credentials and what they may do") from error
            except FileNotFoundError as error:
                raise self._wrong(f"{what}: {_text(error)}") from error
            except _passing() as error:
                if _is_missing_credentials(error):
                    raise self._wrong(f"{what}: {_text(error)}; set AWS_ACCESS_KEY_ID and its secret") from error
                if attempt == ATTEMPTS - 1:
                    raise StorageError(f"{what} after {ATTEMPTS} attempts: {_text(error)}") from error
                _log.warning(
                    "the object store failed; trying again", what=what, error=_text(error), attempt=attempt + 1
                )
            pause = min(FIRST_PAUSE * 2**attempt, MAX_PAUSE)
            time.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311 - spreads clients, hides nothing
        raise AssertionError("the last attempt returns or raises")

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError.of([Violation(self._key, what)])


def _filesystem(key: str) -> Any:
    try:
        import s3fs
    except ImportError as error:
        why = "names an object store, for which a library is missing: pip install 'surogate[s3]'"
        raise ConfigError.of([Violation(key, why)]) from error
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    # Listings are not kept: other machines write to the same place.
    store = s3fs.S3FileSystem(endpoint_url=endpoint, config_kwargs=_SETTINGS, use_listings_cache=False)
    store.retries = 1  # `Objects` tries again
    return store


@functools.cache
def _passing() -> tuple[type[Exception], ...]:
    """Errors after which the same call may succeed."""
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

    return OSError, TimeoutError, BotoCoreError, ClientError, HTTPClientError


def _is_missing_credentials(error: Exception) -> bool:
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError

    return isinstance(error, NoCredentialsError | PartialCredentialsError)


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
