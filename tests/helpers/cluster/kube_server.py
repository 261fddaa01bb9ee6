"""A Kubernetes API server for tests: real HTTP, with answers like those that a real one gave.

It keeps objects with uids and resource versions, refuses unknown fields where asked to be strict, streams watches, and
collects what owners leave behind. Nothing runs here: `tests.helpers.cluster.kube` has the controllers and the nodes.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

Object = dict[str, Any]

GROUPS = {
    "jobs": ("Job", "batch/v1"),
    "pods": ("Pod", "v1"),
    "services": ("Service", "v1"),
    "configmaps": ("ConfigMap", "v1"),
    "events": ("Event", "v1"),
    "trainingjobs": ("TrainingJob", "surogate.dev/v1alpha1"),
}
MODELS = {"jobs": "V1Job", "services": "V1Service", "configmaps": "V1ConfigMap", "pods": "V1Pod"}
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


@dataclass(frozen=True)
class Request:
    """A request as it came."""

    method: str
    plural: str
    name: str
    query: Mapping[str, str]
    body: Any


class StatusError(Exception):
    """An answer that is a Status."""

    def __init__(
        self, code: int, reason: str, message: str, headers: Mapping[str, str] | None = None, **details: Any
    ) -> None:
        super().__init__(message)
        self.code = code
        self.headers = headers or {}
        self.body = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            **({"details": details} if details else {}),
            "code": code,
        }


class ApiServer:
    """Objects of one namespace, and what may go wrong with reaching them.

    Attributes:
        requests: All requests, for tests to look at.
        down: Connections are cut without an answer.
        hangs: Requests are taken and not answered; those that wait are carried out when it is over, late as they are.
        throttled: Number of requests that will be refused with 429.
        retry_after: What those are told, in seconds.
        forbidden: Plurals whose creation is refused, by message.
        refuses: What is said instead of an answer to a request: a Status, raw bytes, or None to answer as usual.
        trickles: Seconds between the bytes of each answer.
        page: Most objects in one page of a list, whatever was asked for.
    """

    runs_jobs = False
    """Whether the Job controller is the server's own; if not, `tests.helpers.cluster.kube` has one."""
    is_dated = False
    """Whether the server is too old to refuse unknown fields, and for suspended Jobs."""

    def __init__(self, namespace: str = "surogate") -> None:
        self.namespace = namespace
        self.objects: dict[str, dict[str, Object]] = {plural: {} for plural in GROUPS}
        self.requests: list[Request] = []
        self.down = False
        self.hangs = False
        self.throttled = 0
        self.retry_after: float | None = None
        self.forbidden: dict[str, str] = {}
        self.refuses: Callable[[Request], StatusError | bytes | None] = lambda request: None
        self.trickles = 0.0
        self.page = 500
        self.logs: Callable[[str, bool], AsyncIterator[str]] | None = None
        self.lost_answers = 0
        self.url = ""
        self._version = 1000
        self._oldest = 0
        self._history: list[tuple[int, str, str, Object]] = []
        self._changed = asyncio.Event()
        self._streams: set[web.StreamResponse] = set()
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._port = 0

    # What tests and controllers do without HTTP.

    def find(self, plural: str, **labels: str) -> list[Object]:
        """Objects that carry labels (`app.kubernetes.io/…` by its last part)."""
        return [item for item in self.objects[plural].values() if _carries(item, labels)]

    def update(self, plural: str, item: Object) -> Object:
        """Writes an object as a controller does, and tells the watchers."""
        item["metadata"]["resourceVersion"] = str(self._next())
        self.objects[plural][item["metadata"]["name"]] = item
        self._tell(plural, "MODIFIED", item)
        return item

    def add(self, plural: str, item: Object) -> Object:
        """Creates an object."""
        kind, version = GROUPS[plural]
        metadata = item.setdefault("metadata", {})
        name = metadata.setdefault("name", "")
        if not _NAME.fullmatch(name):
            raise _invalid(plural, name, "metadata.name", f'Invalid value: "{name}": a lowercase RFC 1123 name')
        if name in self.objects[plural]:
            raise StatusError(409, "AlreadyExists", f'{_qualified(plural)} "{name}" already exists', name=name)
        metadata |= {
            "namespace": self.namespace,
            "uid": str(uuid.uuid4()),
            "creationTimestamp": f"2026-01-01T00:00:{len(self._history) % 60:02d}Z",
            "resourceVersion": str(self._next()),
            "generation": 1,
        }
        item |= {"kind": kind, "apiVersion": version}
        item.setdefault("status", {})
        self.objects[plural][name] = item
        self._tell(plural, "ADDED", item)
        return item

    def remove(self, plural: str, name: str) -> None:
        """Takes an object away for good, and what it owns with it."""
        item = self.objects[plural].pop(name, None)
        if item is None:
            return
        item["metadata"]["resourceVersion"] = str(self._next())
        self._tell(plural, "DELETED", item)
        for other, owned in list(self._owned_by(item["metadata"]["uid"])):
            self.begin_deletion(other, owned)

    def begin_deletion(self, plural: str, item: Object) -> None:
        """Deletes an object; a pod, and what has finalizers, is only marked: somebody else ends it."""
        if plural != "pods" and not item["metadata"].get("finalizers"):
            self.remove(plural, item["metadata"]["name"])
        elif not item["metadata"].get("deletionTimestamp"):
            item["metadata"]["deletionTimestamp"] = "2026-01-01T00:01:00Z"
            self.update(plural, item)

    def expire(self) -> None:
        """Forgets the past: watches that begin or go on before now are answered with 410."""
        self._oldest = self._next()
        self._history.clear()
        self._wake()

    def restore(self, backup: Mapping[str, Mapping[str, Object]], version: int) -> None:
        """Becomes what it was at a version, as from a backup of its database. Nobody is told."""
        self.objects = {plural: copy.deepcopy(dict(items)) for plural, items in backup.items()}
        self._history = [entry for entry in self._history if entry[0] <= version]
        self._version = version

    @property
    def version(self) -> int:
        """The newest resource version."""
        return self._version

    def cut(self) -> None:
        """Breaks all open watches without a word."""
        for stream in self._streams:
            if stream._req is not None and stream._req.transport is not None:
                stream._req.transport.abort()

    async def changed(self) -> None:
        """Returns after the next change."""
        await self._changed.wait()

    # HTTP.

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[ApiServer]:
        """Serves on a free port of 127.0.0.1."""
        application = web.Application()
        application.router.add_route("*", "/{root:api|apis}/{tail:.*}", self._handle)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        self._runner = runner
        await self.listen()
        try:
            yield self
        finally:
            self.hangs = False
            self.cut()
            await runner.cleanup()

    async def listen(self) -> None:
        """Listens, at the port of before if there was one."""
        assert self._runner is not None
        self._site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await self._site.start()
        assert self._site._server is not None
        self._port = self._site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._port}"

    async def refuse(self) -> None:
        """Connections are refused, as of a machine on which nothing listens, until `listen`."""
        assert self._site is not None
        await self._site.stop()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if (instead := await self._overcome(request)) is not None:
            return instead
        plural, name, part = self._place(request.path)
        body = await request.json() if request.can_read_body else None
        asked = Request(request.method, plural, name, dict(request.query), body)
        self.requests.append(asked)
        try:
            if isinstance(said := self.refuses(asked), StatusError):
                raise said
            if said is not None:
                return web.Response(body=said, content_type="text/html")
            if part == "log":
                return await self._log(request, name)
            if request.method == "GET" and not name and request.query.get("watch") == "true":
                return await self._watch(request, plural)
            answer = await self._reply(request, plural, name, part, body)
        except StatusError as error:
            return _json(error.code, error.body, error.headers)
        if self.trickles:
            return await self._trickle(request, answer)
        if self.lost_answers:
            self.lost_answers -= 1
            assert request.transport is not None
            request.transport.abort()  # it was done, and nobody hears of it
        return answer

    async def _overcome(self, request: web.Request) -> web.Response | None:
        """What a request meets on its way; an answer if it gets no further."""
        while self.hangs:  # noqa: ASYNC110 - a test ends it
            await asyncio.sleep(0.02)
        if self.down:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if self.throttled:
            self.throttled -= 1
            headers = {} if self.retry_after is None else {"Retry-After": f"{self.retry_after:g}"}
            return _json(429, {"kind": "Status", "code": 429, "message": "Too many requests"}, headers)
        return None

    async def _trickle(self, request: web.Request, answer: web.Response) -> web.StreamResponse:
        assert isinstance(answer.body, bytes)
        stream = web.StreamResponse(headers={"Content-Type": "application/json"})
        await stream.prepare(request)
        for byte in answer.body:
            await stream.write(bytes([byte]))
            await asyncio.sleep(self.trickles)
        return stream

    def _place(self, path: str) -> tuple[str, str, str]:
        parts = path.strip("/").split("/")
        at = parts.index("namespaces")
        assert parts[at + 1] == self.namespace, path
        plural, name, part = [*parts[at + 2 :], "", "", ""][:3]
        root = "/".join(parts[:at]).removeprefix("apis/").removeprefix("api/")
        assert GROUPS[plural][1] == root, f"{plural} are not in {root}"
        return plural, name, part

    async def _reply(self, request: web.Request, plural: str, name: str, part: str, body: Any) -> web.Response:
        answer = self._answer(request, plural, name, part, body)
        return _json(201 if request.method == "POST" else 200, answer)

    def _answer(self, request: web.Request, plural: str, name: str, part: str, body: Any) -> Object:
        match request.method:
            case "GET" if name:
                return copy.deepcopy(self._existing(plural, name))
            case "GET":
                return self._list(plural, request.query)
            case "POST":
                return copy.deepcopy(self._create(plural, body, request.query))
            case "PATCH":
                return copy.deepcopy(self._patch(plural, name, part, body))
            case "DELETE":
                return copy.deepcopy(self._delete(plural, name, request.query, body))
        raise StatusError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")

    def _existing(self, plural: str, name: str) -> Object:
        if name not in self.objects[plural]:
            raise StatusError(404, "NotFound", f'{_qualified(plural)} "{name}" not found', name=name, kind=plural)
        return self.objects[plural][name]

    def _list(self, plural: str, query: Mapping[str, str]) -> Object:
        found = [item for item in self.objects[plural].values() if _selected(item, query)]
        start, limit = int(query.get("continue") or 0), int(query.get("limit") or 1 << 30)
        limit = min(limit, self.page) if "limit" in query else limit
        page = copy.deepcopy(found[start : start + limit])
        more = {"continue": str(start + limit)} if start + limit < len(found) else {}
        for item in page:  # as a list's items have them: without kind and apiVersion
            item.pop("kind", None)
            item.pop("apiVersion", None)
        return {
            "kind": f"{GROUPS[plural][0]}List",
            "metadata": {"resourceVersion": str(self._version), **more},
            "items": page,
        }

    def _create(self, plural: str, body: Object, query: Mapping[str, str]) -> Object:
        if plural in self.forbidden:
            raise StatusError(403, "Forbidden", self.forbidden[plural])
        if query.get("fieldValidation") == "Strict" and plural in MODELS:
            unknown = sorted(unknown_fields(body, MODELS[plural]))
            if unknown:
                kind, version = GROUPS[plural]
                text = ", ".join(f'unknown field "{field}"' for field in unknown)
                short = version.rpartition("/")[2]
                raise StatusError(
                    400,
                    "BadRequest",
                    f'{kind} in version "{short}" cannot be handled as a {kind}: strict decoding error: {text}',
                )
        item = copy.deepcopy(body)
        for field in list(unknown_fields(body, MODELS[plural])) if plural in MODELS else []:
            _drop(item, field)
        if plural == "jobs":
            check_job(item)
            item["spec"].setdefault("suspend", False)
        return self.add(plural, item)

    def _check_version(self, plural: str, found: Object, given: Object) -> None:
        """An object that is written as it was read must not have changed since."""
        name, version = found["metadata"]["name"], given.get("metadata", {}).get("resourceVersion")
        if version and version != found["metadata"]["resourceVersion"]:
            raise StatusError(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {_qualified(plural)} "{name}": the object has been modified; please '
                "apply your changes to the latest version and try again",
            )

    def _patch(self, plural: str, name: str, part: str, change: Object) -> Object:
        found = copy.deepcopy(self._existing(plural, name))
        self._check_version(plural, found, change)
        if plural == "jobs" and "template" in change.get("spec", {}):
            shown = json.dumps(change["spec"]["template"])
            raise _invalid(plural, name, "spec.template", f"Invalid value: {shown}: field is immutable")
        allowed = {"status"} if part == "status" else set(change) - {"status"}
        merged = _merged(found, {key: change[key] for key in allowed if key in change})
        if merged.get("spec") != found.get("spec"):
            merged["metadata"]["generation"] = found["metadata"]["generation"] + 1
        return self._written(plural, merged)

    def change_spec(self, plural: str, name: str, **spec: Any) -> Object:
        """Sets keys of an object's spec, as somebody who applies it again does."""
        found = self.objects[plural][name]
        metadata = {**found["metadata"], "generation": found["metadata"]["generation"] + 1}
        return self._written(plural, {**found, "metadata": metadata, "spec": {**found["spec"], **spec}})

    def bind(self, pod: Object) -> None:
        """The scheduler gives a pod to the tests' node. Nothing here asks where a pod is."""

    def _written(self, plural: str, item: Object) -> Object:
        if item["metadata"].get("deletionTimestamp") and not item["metadata"].get("finalizers") and plural != "pods":
            self.objects[plural][item["metadata"]["name"]] = item
            self.remove(plural, item["metadata"]["name"])
            return item
        return self.update(plural, item)

    def _delete(self, plural: str, name: str, query: Mapping[str, str], body: Any) -> Object:
        found = self._existing(plural, name)
        options = body or {"propagationPolicy": query.get("propagationPolicy")}  # where there is a body, it wins
        wanted = (options.get("preconditions") or {}).get("uid")
        uid = found["metadata"]["uid"]
        if wanted and wanted != uid:
            raise StatusError(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {_qualified(plural)} "{name}": Precondition failed: UID in '
                f"precondition: {wanted}, UID in object meta: {uid}",
            )
        policy = options.get("propagationPolicy") or ("Orphan" if plural == "jobs" else "Background")
        if policy == "Orphan":
            for other, owned in list(self._owned_by(uid)):
                del owned["metadata"]["ownerReferences"]
                self.update(other, owned)
        self.begin_deletion(plural, found)
        return found

    async def _watch(self, request: web.Request, plural: str) -> web.StreamResponse:
        seen = int(request.query.get("resourceVersion") or 0)
        expired = StatusError(410, "Expired", "The resourceVersion for the provided list is too old.")
        if seen < self._oldest:
            return _json(410, expired.body)
        stream = web.StreamResponse(headers={"Content-Type": "application/json"})
        stream.enable_chunked_encoding()
        await stream.prepare(request)
        self._streams.add(stream)
        ends = asyncio.get_running_loop().time() + float(request.query.get("timeoutSeconds") or 3600)
        try:
            bookmark = {
                "kind": GROUPS[plural][0],
                "metadata": {"resourceVersion": str(seen)},
                "spec": {"containers": None},
            }
            await _send(stream, "BOOKMARK", bookmark)
            while True:
                waiting = self._changed
                if seen < self._oldest:
                    await _send(stream, "ERROR", expired.body)
                    return stream
                for version, changed, kind, item in list(self._history):
                    if version > seen and changed == plural and _selected(item, request.query):
                        await _send(stream, kind, item)
                        seen = version
                try:
                    async with asyncio.timeout_at(ends):
                        await waiting.wait()
                except TimeoutError:
                    return stream
        except ConnectionError:
            return stream
        finally:
            self._streams.discard(stream)

    async def _log(self, request: web.Request, name: str) -> web.StreamResponse:
        self._existing("pods", name)
        assert self.logs is not None
        stream = web.StreamResponse(headers={"Content-Type": "text/plain"})
        stream.enable_chunked_encoding()
        await stream.prepare(request)
        async for line in self.logs(name, request.query.get("follow") == "true"):
            await stream.write(line.encode())
        await stream.write_eof()
        return stream

    def _owned_by(self, uid: str) -> Iterator[tuple[str, Object]]:
        for plural, items in self.objects.items():
            for item in list(items.values()):
                if any(owner["uid"] == uid for owner in item["metadata"].get("ownerReferences") or []):
                    yield plural, item

    def _tell(self, plural: str, kind: str, item: Object) -> None:
        self._history.append((self._version, plural, kind, copy.deepcopy(item)))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _next(self) -> int:
        self._version += 1
        return self._version


def unknown_fields(value: Any, model: str, path: str = "") -> Iterator[str]:
    """Fields of an object that its kind does not have, by the client's own list of them."""
    from kubernetes import client

    if model.startswith("list["):
        for i, item in enumerate(value or []):
            yield from unknown_fields(item, model[5:-1], f"{path}[{i}]")
    elif found := re.fullmatch(r"(?:dict\(str, |Dict\[str, )(.*)[)\]]", model):
        for key, item in (value or {}).items():
            yield from unknown_fields(item, found[1], f"{path}.{key}")
    elif hasattr(client, model) and hasattr(getattr(client, model), "openapi_types"):
        known = getattr(client, model)
        types = {known.attribute_map[name]: kind for name, kind in known.openapi_types.items()}
        for key, item in (value or {}).items():
            here = f"{path}.{key}" if path else key
            if key not in types:
                yield here
            else:
                yield from unknown_fields(item, types[key], here)


def _drop(item: Any, field: str) -> None:
    """Takes a field out of an object: `spec.containers[0].nope`."""
    *path, last = re.findall(r"[^.\[\]]+", field)
    for part in path:
        item = item[int(part) if isinstance(item, list) else part]
    del item[last]


def check_job(job: Object) -> None:
    """What the API server refuses of a Job beyond unknown fields. Raises StatusError."""
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    if pod.get("restartPolicy") not in {"Never", "OnFailure"}:
        raise _invalid(
            "jobs", name, "spec.template.spec.restartPolicy", 'Required value: valid values: "OnFailure", "Never"'
        )
    volumes = {volume["name"] for volume in pod.get("volumes") or []}
    for i, container in enumerate(pod["containers"]):
        where = f"spec.template.spec.containers[{i}]"
        for j, mount in enumerate(container.get("volumeMounts") or []):
            if mount["name"] not in volumes:
                raise _invalid("jobs", name, f"{where}.volumeMounts[{j}].name", f'Not found: "{mount["name"]}"')
        paths = [mount["mountPath"] for mount in container.get("volumeMounts") or []]
        if len(set(paths)) != len(paths):
            raise _invalid("jobs", name, f"{where}.volumeMounts", "Invalid value: must be unique")
        resources = container.get("resources") or {}
        for resource, amount in (resources.get("limits") or {}).items():
            assert isinstance(amount, str), f"{resource}: quantities must be strings"
            if "/" not in resource:
                continue
            if not amount.isdigit():
                shown = f"{float(amount) * 1000:g}m" if "." in amount else amount  # as quantities are written back
                text = f'Invalid value: "{shown}": must be an integer'
                raise _invalid("jobs", name, f"{where}.resources.limits[{resource}]", text)
            if (resources.get("requests") or {}).get(resource, amount) != amount:
                text = f"must be equal to {resource} limit of {amount}"
                raise _invalid("jobs", name, f"{where}.resources.requests", text)


def _invalid(plural: str, name: str, field: str, text: str) -> StatusError:
    kind, version = GROUPS[plural]
    group, slash, _ = version.partition("/")
    message = f'{kind}{f".{group}" if slash else ""} "{name}" is invalid: {field}: {text}'
    return StatusError(422, "Invalid", message, name=name, causes=[{"field": field, "message": text}])


def _qualified(plural: str) -> str:
    group, slash, _ = GROUPS[plural][1].partition("/")
    return f"{plural}.{group}" if slash else plural


def _carries(item: Object, labels: Mapping[str, str]) -> bool:
    mine = {key.rpartition("/")[2]: value for key, value in (item["metadata"].get("labels") or {}).items()}
    return all(mine.get(key) == value for key, value in labels.items())


def _selected(item: Object, query: Mapping[str, str]) -> bool:
    labels = item["metadata"].get("labels") or {}
    for term in filter(None, query.get("labelSelector", "").split(",")):
        key, equals, value = term.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        key, _, value = term.partition("=")
        found: Any = item
        for part in key.split("."):
            found = (found or {}).get(part)
        if found != value:
            return False
    return True


def _merged(item: Any, change: Any) -> Any:
    """JSON merge patch (RFC 7386)."""
    if not isinstance(change, dict):
        return change
    result = dict(item) if isinstance(item, dict) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result


async def _send(stream: web.StreamResponse, kind: str, item: Any) -> None:
    await stream.write(json.dumps({"type": kind, "object": item}).encode() + b"\n")


def _json(status: int, body: Any, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(status=status, text=json.dumps(body), content_type="application/json", headers=headers)
