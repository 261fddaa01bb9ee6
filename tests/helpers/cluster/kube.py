"""A small cluster for tests: the fake API server, a Job controller, and nodes whose pods are servers of this process.

A pod has an address of its own within 127.0.0.0/8, and the port that pods have; what is served there is up to the test.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from surogate.config.service import ServiceSettings
from surogate.rpc.server import RpcServer
from tests.helpers.cluster.kube_cluster import RealCluster
from tests.helpers.cluster.kube_real import RealApi
from tests.helpers.cluster.kube_server import ApiServer, Object
from tests.helpers.rpc import serving
from tests.helpers.waiting import until

PORT = 50051
Register = Callable[[Object, RpcServer], None]
"""Adds to a pod's server what the pod serves."""

_PROCESS = os.getpid()
_ADDRESSES = itertools.count(2)

TEMPLATE: Object = {
    "apiVersion": "v1",
    "kind": "Pod",
    "spec": {
        "schedulerName": "surogate-test",  # no real node takes them: the tests are their kubelet
        "containers": [
            {
                "name": "worker",
                "image": "surogate:test",
                "resources": {"limits": {"memory": "1Gi", "cpu": 1}},
                "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
            }
        ],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    },
}


def write_templates(folder: Path, **changes: Any) -> Path:
    """The pod templates of an operator; `changes` are further keys of the pods' spec."""
    folder.mkdir(parents=True, exist_ok=True)
    for component in ("trainer", "inference", "reward"):
        template = {**TEMPLATE, "spec": {**TEMPLATE["spec"], **changes}}
        (folder / f"{component}.yaml").write_text(yaml.safe_dump(template))
    return folder


def write_kubeconfig(file: Path, url: str) -> Path:
    """A kubeconfig for the fake API server."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": url}}],
        "users": [{"name": "test", "user": {"token": "a-token"}}],
    }
    file.write_text(yaml.safe_dump(config))
    return file


class Cluster:
    """Runs the pods of Jobs.

    Attributes:
        api: The API server.
        holds: Pods stay as they were created, for the test to say what happens to them.
        starves: Jobs get no pods at all.
        strands: Uids of pods whose node is away: they do not end.
        said: Log lines by pod.
        settings: Further settings of the server in a pod, by the pod.
    """

    def __init__(self, api: ApiServer, register: Register) -> None:
        self.api = api
        self.holds = False
        self.starves = False
        self.strands: set[str] = set()
        self.said: dict[str, list[str]] = {}
        self.settings: Callable[[Object], dict[str, Any]] = lambda pod: {}
        self._register = register
        self._running: dict[str, AbstractAsyncContextManager[RpcServer]] = {}
        self._placed: set[str] = set()
        """Uids of pods that were started."""
        self._begun: set[str] = set()
        """Uids of Jobs that have had pods."""
        api.logs = self._log

    @property
    def pods(self) -> list[Object]:
        """The pods that there are."""
        return list(self.api.objects["pods"].values())

    def pod(self, component: str, index: int = 0) -> Object:
        """The newest pod of a worker."""
        return self.api.find("pods", component=component, index=str(index))[-1]

    async def until(self, met: Callable[[], Any]) -> Any:
        """Waits until something about the cluster is so, and returns it."""
        return await until(met)

    async def keep(self) -> None:
        """Controllers and nodes at work."""
        while True:
            changed = self.api._changed
            await self._reconcile()
            with suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await changed.wait()

    async def stop(self) -> None:
        """Ends all pods."""
        for name in list(self._running):
            await self._end(name)

    async def fail(self, pod: Object, code: int = 1, **terminated: Any) -> None:
        """A container of a pod ends by itself."""
        await self._end(pod["metadata"]["name"])
        state = {"terminated": {"exitCode": code, "reason": "Completed" if code == 0 else "Error", **terminated}}
        pod["status"]["phase"] = "Succeeded" if code == 0 else "Failed"
        pod["status"]["containerStatuses"] = [_container(pod, state)]
        self.api.update("pods", pod)

    async def evict(self, pod: Object, code: int = 0) -> None:
        """The node of a pod is drained: it ends in good order."""
        reason = {"reason": "EvictionByEvictionAPI", "message": "Eviction API: evicting"}
        pod["status"].setdefault("conditions", []).append({"type": "DisruptionTarget", "status": "True", **reason})
        await self.fail(pod, code)
        self.api.begin_deletion("pods", pod)

    def set_status(self, pod: Object, **status: Any) -> None:
        """What the node or the scheduler says of a pod."""
        pod["status"] |= status
        self.api.update("pods", pod)

    async def _reconcile(self) -> None:
        for job in list(self.api.objects["jobs"].values()):
            if not self.api.runs_jobs:
                self._control(job)
        for pod in self.pods:
            name, phase = pod["metadata"]["name"], pod["status"].get("phase")
            if pod["metadata"].get("deletionTimestamp"):
                await self._end(name)
                if pod["metadata"]["uid"] in self.strands:
                    continue
                if phase not in {"Succeeded", "Failed"} or not self._job_of(pod):
                    self.api.remove("pods", name)
            elif phase == "Pending" and not self.holds and self._is_new(pod):
                self._placed.add(pod["metadata"]["uid"])
                await self._run(pod)

    def _is_new(self, pod: Object) -> bool:
        """Whether nothing has happened to a pod; what is seen of it may be older than what was done."""
        return not pod["status"].get("conditions") and pod["metadata"]["uid"] not in self._placed

    def _job_of(self, pod: Object) -> Object | None:
        owners = pod["metadata"].get("ownerReferences") or [{"uid": ""}]
        jobs = self.api.objects["jobs"].values()
        return next((job for job in jobs if job["metadata"]["uid"] == owners[0]["uid"]), None)

    def _control(self, job: Object) -> None:
        """The Job controller: pods for the indices that lack one, and the Job's end."""
        spec, conditions = job["spec"], job.setdefault("status", {}).setdefault("conditions", [])
        ended = {one["type"] for one in conditions if one["status"] == "True"}
        if ended & {"Complete", "Failed"}:
            return
        if "FailureTarget" in ended or "SuccessCriteriaMet" in ended:
            self._finish(job, conditions)
            return
        if spec.get("suspend") or self.starves:
            self._begun.discard(job["metadata"]["uid"])  # pods that it loses now are no failures
            return
        mine = [pod for pod in self.pods if self._job_of(pod) is job]
        broken = [pod for pod in mine if pod["status"]["phase"] == "Failed" and not _disrupted(pod)]
        vanished = job["metadata"]["uid"] in self._begun and not mine
        if broken or vanished:
            text = "Job has reached the specified backoff limit"
            self._condition(job, "FailureTarget", "BackoffLimitExceeded", text)
            return
        done = {_index(pod) for pod in mine if pod["status"]["phase"] == "Succeeded"}
        if len(done) == spec["completions"]:
            self._condition(
                job, "SuccessCriteriaMet", "CompletionsReached", "Reached expected number of succeeded pods"
            )
            return
        active = {_index(pod) for pod in mine if pod["status"]["phase"] in {"Pending", "Running"}}
        for index in set(range(spec["completions"])) - done - active:
            self._create_pod(job, index)
            self._begun.add(job["metadata"]["uid"])

    def end_job(self, job: Object, reason: str, message: str = "") -> None:
        """The Job controller gives a Job up, for example since its deadline has passed."""
        self._condition(job, "FailureTarget", reason, message)

    def _finish(self, job: Object, conditions: list[Object]) -> None:
        announced = conditions[-1]
        for pod in self.pods:
            if self._job_of(pod) is job and pod["status"]["phase"] in {"Pending", "Running"}:
                self.api.begin_deletion("pods", pod)
                return  # not before they are gone
        kind = "Failed" if announced["type"] == "FailureTarget" else "Complete"
        self._condition(job, kind, announced["reason"], announced.get("message", ""))

    def _condition(self, job: Object, kind: str, reason: str, message: str) -> None:
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        job["status"].setdefault("conditions", []).append(condition)
        self.api.update("jobs", job)

    def _create_pod(self, job: Object, index: int) -> None:
        template, name = job["spec"]["template"], job["metadata"]["name"]
        metadata = {
            "name": f"{name}-{index}-{next(_ADDRESSES):05d}",
            "labels": {**template["metadata"]["labels"], "batch.kubernetes.io/job-name": name},
            "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
            "ownerReferences": [
                {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    "name": name,
                    "uid": job["metadata"]["uid"],
                    "controller": True,
                }
            ],
        }
        self.api.add("pods", {"metadata": metadata, "spec": template["spec"], "status": {"phase": "Pending"}})

    async def _run(self, pod: Object) -> None:
        self.api.bind(pod)
        address = f"127.{1 + _PROCESS % 250}.{_PROCESS // 250 % 250}.{next(_ADDRESSES) % 250 + 2}"
        if _index(pod) == 0:
            settings = ServiceSettings(listen=f"{address}:{PORT}", **self.settings(pod))
            server = serving(lambda server: self._register(pod, server), settings)
            pod["status"]["podIP"] = address
            await server.__aenter__()
            self._running[pod["metadata"]["name"]] = server
        running = _container(pod, {"running": {"startedAt": "2026-01-01T00:00:00Z"}})
        self.set_status(pod, phase="Running", podIP=address, containerStatuses=[running])

    async def _end(self, name: str) -> None:
        server = self._running.pop(name, None)
        if server is not None:
            await server.__aexit__(None, None, None)

    async def _log(self, pod: str, follow: bool) -> AsyncIterator[str]:
        sent = 0
        while True:
            lines = self.said.get(pod, [])
            for line in lines[sent:]:
                yield f"{line}\n"
            sent = len(lines)
            if not follow or pod not in self._running:
                return
            await asyncio.sleep(0.02)


def _index(pod: Object) -> int:
    return int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"])


def _disrupted(pod: Object) -> bool:
    return any(one["type"] == "DisruptionTarget" for one in pod["status"].get("conditions") or [])


def _container(pod: Object, state: Object) -> Object:
    container = pod["spec"]["containers"][0]
    return {"name": container["name"], "image": container["image"], "state": state, "restartCount": 0}


REAL: RealCluster | None = None
"""The cluster that the fixture `api_server` has the test run on; None is the fake one."""


def new_api() -> ApiServer:
    """An API server with an empty namespace."""
    return RealApi(REAL, f"surogate-test-{secrets.token_hex(3)}") if REAL is not None else ApiServer()


@asynccontextmanager
async def kubernetes(register: Register) -> AsyncIterator[Cluster]:
    """A cluster whose pods serve what `register` adds."""
    async with new_api().serving() as api:
        cluster = Cluster(api, register)
        work: asyncio.Future[None] | Awaitable[None] = asyncio.create_task(cluster.keep())
        try:
            yield cluster
        finally:
            assert isinstance(work, asyncio.Task)
            if work.done():
                work.result()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            await cluster.stop()
