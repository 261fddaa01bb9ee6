"""A real Kubernetes API server with the face of the fake one, so that the same tests run against both.

Clients go through a proxy, which makes the network as bad as a test wants it, and every request one of the
orchestrator's own account: the role that we ship is what it may do. What the tests see of the cluster comes by watches;
what they do to it is done at once, by whoever may do everything.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web

from orchestrator_svc.launchers.kubernetes.names import MANAGER
from tests.helpers.cluster.kube_cluster import STRICT, RealCluster
from tests.helpers.cluster.kube_server import GROUPS, ApiServer, Object, StatusError

RBAC = Path(__file__).parents[3] / "k8s" / "base" / "rbac.yaml"
ACCOUNT = "surogate-orchestrator"
NODE = "surogate-test"
"""Name of the node that the tests' pods are on. There is none of that name: the tests are its kubelet."""
_TRACKED = "batch.kubernetes.io/job-tracking"
"""Finalizer by which a Job controller keeps pods until it has counted them."""
_NO_GRACE = {"gracePeriodSeconds": 0}
_ENDED = frozenset({"Succeeded", "Failed"})


class RealApi(ApiServer):
    """A namespace of a real cluster."""

    def __init__(self, cluster: RealCluster, namespace: str) -> None:
        super().__init__(namespace)
        self.runs_jobs = cluster.runs_jobs
        self.is_dated = cluster.minor < STRICT
        self._cluster = cluster
        self._expired: set[str] = set()
        self._session: aiohttp.ClientSession | None = None

    # What tests, controllers and nodes do.

    def add(self, plural: str, item: Object) -> Object:
        item = {**item, "kind": GROUPS[plural][0], "apiVersion": GROUPS[plural][1]}
        if plural == "pods" and not self.runs_jobs:
            item["metadata"]["finalizers"] = [_TRACKED]
        made = self._do("POST", plural, body=item, query="?fieldValidation=Strict")
        self.objects[plural][made["metadata"]["name"]] = made
        return made

    def update(self, plural: str, item: Object) -> Object:
        name = item["metadata"]["name"]
        with suppress(_GoneError):
            self._do("PATCH", plural, f"/{name}/status", {"status": item["status"]})
        return item

    def remove(self, plural: str, name: str) -> None:
        if plural != "pods":
            self.begin_deletion(plural, self.objects[plural][name])
            return
        pod = self.objects[plural].get(name) or {}
        with suppress(_GoneError):
            if pod.get("status", {}).get("phase") not in _ENDED:
                self._do("PATCH", plural, f"/{name}/status", {"status": _killed(pod)})
            self._do("DELETE", plural, f"/{name}", _NO_GRACE)
            if not self.runs_jobs:
                self._do("PATCH", plural, f"/{name}", {"metadata": {"finalizers": None}})

    def begin_deletion(self, plural: str, item: Object) -> None:
        with suppress(_GoneError):
            self._do("DELETE", plural, f"/{item['metadata']['name']}", {"propagationPolicy": "Background"})

    def change_spec(self, plural: str, name: str, **spec: Any) -> Object:
        current = self._do("GET", plural, f"/{name}")
        return self._do("PUT", plural, f"/{name}", {**current, "spec": {**current["spec"], **spec}})

    def bind(self, pod: Object) -> None:
        binding = {"apiVersion": "v1", "kind": "Binding", "target": {"kind": "Node", "name": NODE}}
        name = pod["metadata"]["name"]
        if not pod["spec"].get("nodeName"):
            self._do("POST", "pods", f"/{name}/binding", {**binding, "metadata": {"name": name}})

    def expire(self) -> None:
        """The next watches begin at the first version that there was, which the server has forgotten."""
        self._expired = set(GROUPS)
        self.cut()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[ApiServer]:
        self._make_namespace()
        async with AsyncExitStack() as stack:
            stack.callback(self._delete_namespace)
            self._session = await stack.enter_async_context(self._cluster.session())
            await stack.enter_async_context(super().serving())
            follow = [asyncio.create_task(self._follow(plural)) for plural in GROUPS]
            stack.push_async_callback(_end, follow)
            yield self

    # The proxy.

    async def _reply(self, request: web.Request, plural: str, name: str, part: str, body: Any) -> web.Response:
        async with self._forward(request, plural, body) as answer:
            return web.Response(status=answer.status, body=await answer.read(), headers=_kept(answer))

    async def _watch(self, request: web.Request, plural: str) -> web.StreamResponse:
        async with self._forward(request, plural, None) as answer:
            stream = web.StreamResponse(status=answer.status, headers=_kept(answer))
            stream.enable_chunked_encoding()
            await stream.prepare(request)
            self._streams.add(stream)
            try:
                async for chunk in answer.content.iter_any():
                    await stream.write(chunk)
            except (ConnectionError, aiohttp.ClientError):
                return stream
            finally:
                self._streams.discard(stream)
            await stream.write_eof()
            return stream

    @asynccontextmanager
    async def _forward(self, request: web.Request, plural: str, body: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None
        query = dict(request.query)
        if "watch" in query and plural in self._expired:
            self._expired.discard(plural)
            query["resourceVersion"] = "1"
        headers = {"Impersonate-User": self._who(request, plural), "Content-Type": request.content_type}
        data = None if body is None else json.dumps(body)
        url = self._cluster.url + request.path
        async with self._session.request(request.method, url, params=query, data=data, headers=headers) as answer:
            yield answer

    def _who(self, request: web.Request, plural: str) -> str:
        """The account that a request is made by; where a test forbids creation, one that may nothing."""
        if request.method == "POST" and plural in self.forbidden:
            found = re.search(r'User "([^"]+)"', self.forbidden[plural])
            assert found is not None, "the message names no user"
            return found[1]
        return f"system:serviceaccount:{self.namespace}:{ACCOUNT}"

    # What is seen of the cluster.

    async def _follow(self, plural: str) -> None:
        version = ""
        while True:
            with suppress(aiohttp.ClientError):
                if not version:
                    version = await self._list_all(plural)
                version = await self._read_watch(plural, version)

    async def _list_all(self, plural: str) -> str:
        assert self._session is not None
        async with self._session.get(self._url(plural)) as answer:
            found = await answer.json()
        items = [self._whole(plural, item) for item in found.get("items") or []]
        self.objects[plural] = {item["metadata"]["name"]: item for item in items if _is_seen(plural, item)}
        self._wake()
        return str(found.get("metadata", {}).get("resourceVersion", ""))

    async def _read_watch(self, plural: str, version: str) -> str:
        assert self._session is not None
        query = {"watch": "true", "resourceVersion": version, "timeoutSeconds": "300"}
        async with self._session.get(self._url(plural), params=query) as answer:
            async for line in answer.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    return ""
                self._take(plural, event["type"], self._whole(plural, event["object"]))
                version = event["object"]["metadata"]["resourceVersion"]
        return version

    def _take(self, plural: str, change: str, item: Object) -> None:
        if not _is_seen(plural, item):
            return
        name, uid = item["metadata"]["name"], item["metadata"]["uid"]
        there = self.objects[plural].get(name)
        if change != "DELETED":
            self.objects[plural][name] = item
        elif there is not None and there["metadata"]["uid"] == uid:
            del self.objects[plural][name]
        if change == "DELETED" and not self._cluster.collects:
            for other, owned in list(self._owned_by(uid)):
                self.begin_deletion(other, owned)
        self._wake()

    def _whole(self, plural: str, item: Object) -> Object:
        return {**item, "kind": GROUPS[plural][0], "apiVersion": GROUPS[plural][1], "status": item.get("status") or {}}

    def _url(self, plural: str, rest: str = "") -> str:
        version = GROUPS[plural][1]
        root = f"apis/{version}" if "/" in version else f"api/{version}"
        return f"{self._cluster.url}/{root}/namespaces/{self.namespace}/{plural}{rest}"

    def _do(self, method: str, plural: str, rest: str = "", body: Any = None, query: str = "") -> Object:
        return do(self._cluster, method, self._url(plural, rest) + query, body)

    def _make_namespace(self) -> None:
        """The namespace, as strict as the one that we ship, with the orchestrator's role in it."""
        labels = {f"pod-security.kubernetes.io/{what}": "restricted" for what in ("enforce", "warn")}
        self._cluster.make_namespace(self.namespace, labels)
        install_role(self._cluster, self.namespace)

    def _delete_namespace(self) -> None:
        for name, pod in list(self.objects["pods"].items()):  # no kubelet would end them
            self.objects["pods"][name] = {**pod, "status": {"phase": "Failed"}}
            self.remove("pods", name)
        for name in list(self.objects["trainingjobs"]):
            with suppress(_GoneError):
                self._do("PATCH", "trainingjobs", f"/{name}", {"metadata": {"finalizers": None}})
        self._cluster.delete_namespace(self.namespace)


def install_role(cluster: RealCluster, namespace: str) -> None:
    """The accounts that we ship, and the orchestrator's role."""

    def make(root: str, plural: str, body: Object) -> None:
        do(cluster, "POST", f"{cluster.url}/{root}/namespaces/{namespace}/{plural}", body)

    for account in (ACCOUNT, "surogate-worker"):
        make("api/v1", "serviceaccounts", {"metadata": {"name": account}})
    for body in yaml.safe_load_all(RBAC.read_text()):
        body["metadata"]["namespace"] = namespace
        for subject in body.get("subjects") or []:
            subject["namespace"] = namespace
        make("apis/rbac.authorization.k8s.io/v1", f"{body['kind'].lower()}s", body)


class _GoneError(StatusError):
    """The object is not there, or not any more as it was."""


def do(cluster: RealCluster, method: str, url: str, body: Any = None) -> Object:
    """One call by whoever may do everything. Raises StatusError."""
    content = "application/merge-patch+json" if method == "PATCH" else "application/json"
    status, answer, _ = cluster.request(method, url, body, content)
    if status < 400:
        return answer
    kind = _GoneError if status in {404, 409} else StatusError
    raise kind(status, answer.get("reason", ""), answer.get("message", str(answer)))


def _is_seen(plural: str, item: Object) -> bool:
    """Whether an object is any of the tests' business: clusters add some of their own."""
    if plural == "configmaps":
        return bool(item["metadata"]["name"] != "kube-root-ca.crt")
    if plural == "events":
        return bool((item.get("source") or {}).get("component") == MANAGER)
    return True


def _killed(pod: Object) -> Object:
    """How a kubelet says that a pod has ended as it was told to."""
    terminated = {"terminated": {"exitCode": 143, "reason": "Error"}}
    containers = pod.get("status", {}).get("containerStatuses") or []
    return {"phase": "Failed", "containerStatuses": [{**one, "state": terminated} for one in containers]}


def _kept(answer: aiohttp.ClientResponse) -> Mapping[str, str]:
    return {name: answer.headers[name] for name in ("Content-Type", "Retry-After", "Warning") if name in answer.headers}


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
