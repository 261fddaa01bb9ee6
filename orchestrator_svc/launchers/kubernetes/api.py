"""The Kubernetes API as coroutines on plain dictionaries.

Configuration, authentication and transport are the official client's. Its models are not used: they refuse what API
servers really send (a bookmark whose containers are null), and differ between versions of the client.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from orchestrator_svc.launchers.kubernetes.answers import (
    ApiUnavailableError,
    ConflictError,
    ExpiredError,
    parsed,
    status_error,
)
from orchestrator_svc.launchers.kubernetes.connection import call, connect, open_stream, split_lines
from orchestrator_svc.launchers.kubernetes.names import MANAGER
from surogate.errors import (
    NotFoundError,
    SurogateError,
)
from surogate.telemetry.log import get_logger

Object = dict[str, Any]
"""A Kubernetes object as JSON has it."""

CALL_SECONDS = 15.0
"""Longest wait for one answer."""
WATCH_SECONDS = 60
"""The API server is asked to end a watch after this time; another one goes on from there. So long, and no longer, does
nobody notice that a connection was lost without a word."""
_WATCH_SILENCE = WATCH_SECONDS + 15.0
_CALLS, _STREAMS = 8, 64
_FIRST_PAUSE, _MAX_PAUSE = 0.25, 10.0
_PAGE = 500
_WRITER = ("fieldManager", MANAGER)
"""Who has set the fields that are written here, for people who apply theirs on the server's side."""
_GRACE = 5.0
"""Seconds beyond its own timeout after which a call is given up, whatever its thread does."""

T = TypeVar("T")
Objects = list[Object]
Listing = tuple[Objects, str]
"""Objects, and the resource version of all of them."""
Told = Callable[[str], Awaitable[None]]
"""Hears why a call has to wait."""
_log = get_logger("kubernetes")


@dataclass(frozen=True)
class Kind:
    """A kind of object, and where the API has it."""

    name: str
    version: str
    plural: str

    def path(self, namespace: str, name: str = "", part: str = "") -> str:
        """`/apis/batch/v1/namespaces/NAMESPACE/jobs/NAME/status`."""
        root = f"/apis/{self.version}" if "/" in self.version else f"/api/{self.version}"
        return "/".join([root, "namespaces", namespace, self.plural, *filter(None, (name, part))])


JOB = Kind("Job", "batch/v1", "jobs")
POD = Kind("Pod", "v1", "pods")
SERVICE = Kind("Service", "v1", "services")
CONFIG_MAP = Kind("ConfigMap", "v1", "configmaps")
EVENT = Kind("Event", "v1", "events")


class Api:
    """One namespace of a cluster.

    Args:
        namespace: Namespace of all calls.
        kubeconfig: File to read; None is the pod's own account inside a cluster, else the user's usual file.
        patience: Seconds for which a call is tried again while the API server is away or busy.
    """

    def __init__(self, namespace: str, *, kubeconfig: Path | None = None, patience: float = 300.0) -> None:
        self.namespace = namespace
        self.patience = patience
        self._kubeconfig = kubeconfig
        self._client: Any = None
        self._calls = ThreadPoolExecutor(_CALLS, thread_name_prefix="kubernetes")
        self._streams = ThreadPoolExecutor(_STREAMS, thread_name_prefix="kubernetes-stream")

    async def open(self) -> None:
        """Reads the configuration. Raises ConfigError if there is none."""
        self._client = await asyncio.get_running_loop().run_in_executor(self._calls, connect, self._kubeconfig)

    async def close(self) -> None:
        """Gives the threads back; calls under way end by their own deadlines."""
        self._calls.shutdown(wait=False, cancel_futures=True)
        self._streams.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.client.rest_client.pool_manager.clear()

    async def get(self, kind: Kind, name: str, *, told: Told | None = None) -> Object:
        """An object. Raises NotFoundError."""
        return await self._json("GET", kind.path(self.namespace, name), told=told)

    async def find(self, kind: Kind, name: str, *, told: Told | None = None) -> Object | None:
        """An object, or None if there is none."""
        try:
            return await self.get(kind, name, told=told)
        except NotFoundError:
            return None

    async def list(self, kind: Kind, *, labels: str = "", fields: str = "", patience: float | None = None) -> Listing:
        """All objects that match the selectors, and the resource version of the list."""
        path, query = kind.path(self.namespace), _selectors(labels, fields)
        try:
            return await self._pages(path, [("limit", str(_PAGE)), *query], patience)
        except ExpiredError:  # the server has forgotten the list before its last page: all of it at once, then
            return await self._pages(path, query, patience)

    async def _pages(self, path: str, query: Sequence[tuple[str, str]], patience: float | None) -> Listing:
        found: Objects = []
        token = ""
        while True:
            page = await self._json("GET", path, query=[*query, *_given("continue", token)], patience=patience)
            found += page.get("items") or []
            token = page["metadata"].get("continue") or ""
            if not token:
                return found, str(page["metadata"].get("resourceVersion", ""))

    async def create(self, kind: Kind, body: Object, *, told: Told | None = None) -> Object:
        """Creates an object; unknown fields are refused by name. Raises AlreadyExistsError, OverQuotaError."""
        query = [("fieldValidation", "Strict"), _WRITER]
        return await self._json("POST", kind.path(self.namespace), body=body, query=query, told=told)

    async def patch(self, kind: Kind, name: str, change: Object, part: str = "") -> Object:
        """Merges a change into an object (JSON merge patch). Raises ConflictError if the change names a resource
        version that is not the object's any more."""
        path = kind.path(self.namespace, name, part)
        return await self._json("PATCH", path, body=change, query=[_WRITER], content="application/merge-patch+json")

    async def delete(self, kind: Kind, name: str, uid: str) -> None:
        """Deletes the object of that uid, and all that it owns; another one of the same name stays.

        The policy stands in the body too: where there is a body the API server does not look at the query, and without
        a policy it would orphan a Job's pods.
        """
        policy = "Background"
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": policy,
            "preconditions": {"uid": uid},
        }
        with suppress(NotFoundError, ConflictError):  # gone, or another object by now
            path = kind.path(self.namespace, name)
            await self._json("DELETE", path, body=options, query=[("propagationPolicy", policy)])

    async def watch(self, kind: Kind, version: str, *, labels: str = "") -> AsyncGenerator[tuple[str, Object], None]:
        """Events after a resource version: `ADDED`, `MODIFIED`, `DELETED` and `BOOKMARK`, until the server ends them.

        Raises:
            ExpiredError: The version is too old.
        """
        query = [
            ("watch", "true"),
            ("resourceVersion", version),
            ("allowWatchBookmarks", "true"),
            ("timeoutSeconds", str(WATCH_SECONDS)),
            *_selectors(labels),
        ]
        async with aclosing(self._lines(kind.path(self.namespace), query, _WATCH_SILENCE)) as lines:
            async for line in lines:
                event = parsed(line)
                if event["type"] == "ERROR":
                    raise status_error(int(event["object"].get("code", 500)), event["object"], None)
                yield event["type"], event["object"]

    async def log(self, pod: str, *, container: str, tail: int, previous: bool = False) -> str:
        """The last lines of a pod's log, with the time before each; empty if there is none to be had."""
        query = [("container", container), ("tailLines", str(tail)), ("limitBytes", str(tail * 4096))]
        query += _given("previous", "true" if previous else "")
        try:
            raw = await self._request("GET", POD.path(self.namespace, pod, "log"), bytes, query=query, patience=10.0)
        except SurogateError as error:
            _log.info("no log to be had", pod=pod, why=str(error))
            return ""
        return raw.decode(errors="replace")

    async def follow_log(self, pod: str, *, container: str, tail: int) -> AsyncGenerator[str, None]:
        """The last lines of a pod's log, and new ones until the container ends."""
        query = [("container", container), ("tailLines", str(tail)), ("follow", "true")]
        async with aclosing(self._lines(POD.path(self.namespace, pod, "log"), query, 3600.0)) as lines:
            async for line in lines:
                yield line.decode(errors="replace")

    async def _json(self, method: str, path: str, **options: Any) -> Object:
        return await self._request(method, path, parsed, **options)

    async def _request(
        self,
        method: str,
        path: str,
        read: Callable[[bytes], T],
        *,
        body: Object | None = None,
        query: Sequence[tuple[str, str]] = (),
        content: str = "application/json",
        patience: float | None = None,
        told: Told | None = None,
    ) -> T:
        """What `read` makes of the answer to one call, made again while the API server is away or busy. A repeat of
        what was done is seen by its name: AlreadyExists, NotFound. `told` hears once why it has to be made again, if
        it is not at once well."""
        until = time.monotonic() + (self.patience if patience is None else patience)
        for attempt in range(1_000_000):
            request = partial(call, self._client, method, path, body, query, content, CALL_SECONDS)
            try:
                return read(await self._in_thread(self._calls, request, CALL_SECONDS + _GRACE))
            except ApiUnavailableError as error:
                pause = pause_before(attempt, error.retry_after)
                if time.monotonic() + pause > until:
                    raise
                _log.warning("the API server is away or busy; trying again", error=str(error), pause=round(pause, 2))
                if attempt == 1 and told is not None:
                    await told(str(error))
            await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    async def _lines(self, path: str, query: Sequence[tuple[str, str]], silence: float) -> AsyncGenerator[bytes, None]:
        """Lines of a streamed answer as they come. Each read has a thread while it waits."""
        opening = partial(open_stream, self._client, path, query, CALL_SECONDS, silence)
        response = await self._in_thread(self._streams, opening, CALL_SECONDS + _GRACE)
        lines = split_lines(response)
        try:
            while (line := await self._in_thread(self._streams, partial(_next, lines), silence + _GRACE)) is not None:
                yield line
        finally:
            with suppress(Exception):  # wakes the thread that reads; a connection that has ended cannot be shut down
                response.shutdown()

    async def _in_thread(self, threads: ThreadPoolExecutor, work: Callable[[], T], seconds: float) -> T:
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.get_running_loop().run_in_executor(threads, work)
        except TimeoutError as error:
            raise ApiUnavailableError(f"the API server did not answer within {seconds:g} s") from error


def pause_before(attempt: int, retry_after: float | None) -> float:
    """Seconds before the next attempt: what the server asked for, else doubling, with some chance in it."""
    if retry_after is not None:
        return min(retry_after, 60.0) + random.uniform(0, 0.1)  # noqa: S311 - spreads clients, hides nothing
    return min(_MAX_PAUSE, _FIRST_PAUSE * 2.0 ** min(attempt, 10)) * random.uniform(0.75, 1.25)  # noqa: S311


def _next(lines: Iterator[bytes]) -> bytes | None:
    return next(lines, None)


def _selectors(labels: str = "", fields: str = "") -> list[tuple[str, str]]:
    return [*_given("labelSelector", labels), *_given("fieldSelector", fields)]


def _given(name: str, value: str) -> list[tuple[str, str]]:
    return [(name, value)] if value else []
