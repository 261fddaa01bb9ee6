"""The workers of one job as Kubernetes objects, all of them owned by one: the job's anchor."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from orchestrator_svc.launchers.base import Component, Job, Worker, WorkerPool, WorkerSpec
from orchestrator_svc.launchers.incarnations import RestartPolicy
from orchestrator_svc.launchers.kubernetes import names
from orchestrator_svc.launchers.kubernetes.api import CONFIG_MAP, JOB, SERVICE, Api, Kind, Object
from orchestrator_svc.launchers.kubernetes.manifests import Manifests, Owner
from orchestrator_svc.launchers.kubernetes.mirror import Mirror
from orchestrator_svc.launchers.kubernetes.policy import check_pod
from orchestrator_svc.launchers.kubernetes.templates import Templates
from orchestrator_svc.launchers.kubernetes.worker import KubernetesWorker
from orchestrator_svc.launchers.static import StaticWorker
from surogate.errors import AlreadyExistsError, FailedPreconditionError, SurogateError
from surogate.rpc.channel import ClientSecurity
from surogate.telemetry.log import get_logger

if TYPE_CHECKING:
    from orchestrator_svc.settings import OrchestratorSettings

_log = get_logger("launcher")
_GONE_SECONDS = 120.0
_GONE_POLL = 0.25


class KubernetesPool(WorkerPool):
    """The Jobs of one job. They outlive the orchestrator: the next one finds them again by their names and labels."""

    ends_workers = False

    def __init__(
        self, job: Job, api: Api, mirror: Mirror, settings: OrchestratorSettings, security: ClientSecurity
    ) -> None:
        self.job = job
        self.api = api
        self.mirror = mirror
        self.security = security
        self.logs = job.output_dir / "logs"
        self.by_name = settings.worker_addresses == "dns"
        self.manifests = Manifests(job.job_id, job.uid, job.config, settings)
        self._settings = settings
        self._templates = Templates(settings.pod_templates)
        self._policy = RestartPolicy(max_restarts=settings.max_worker_restarts)
        self._owner: Owner | None = None
        self._found: dict[tuple[str, int], list[Object]] = defaultdict(list)
        self._workers: list[KubernetesWorker | StaticWorker] = []
        self._making: dict[Component, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def workers(self) -> Sequence[Worker]:
        return self._workers

    def count(self, component: Component, wanted: int) -> int:
        return wanted

    async def open(self) -> None:
        """Makes the anchor, or finds it and what hangs on it."""
        anchor = await self._anchor()
        self._owner = Owner("ConfigMap", "v1", anchor["metadata"]["name"], anchor["metadata"]["uid"])
        for found in await self._jobs():
            self._found[_place(found)].append(found)

    async def start(self, spec: WorkerSpec) -> Worker:
        if spec.component == "reward" and not spec.image and self._settings.reward_address:
            shared = self._settings.reward_address
            static = StaticWorker("reward", spec.index, shared, self.security, self._settings.worker_wait)
            self._workers.append(static)
            static.follow()
            return static
        self.worker_manifest(spec, 1)  # what is wrong with it is told before anything is made
        async with self._making[spec.component]:
            await self._ensure(SERVICE, self.manifests.service(spec.component, self.owner))
            if spec.config is not None:
                await self._ensure(CONFIG_MAP, self.manifests.worker_config(spec, self.owner))
        worker = KubernetesWorker(spec, self, self._policy)
        found = self._found.pop((spec.component, spec.index), [])
        newest = max(found, key=lambda job: int(job["metadata"]["labels"][names.INCARNATION]), default=None)
        for old in found:
            if old is not newest:
                await self.api.delete(JOB, old["metadata"]["name"], old["metadata"]["uid"])
        self._workers.append(worker)
        worker.launch(found)
        return worker

    async def remove(self, worker: Worker) -> None:
        """Ends one worker."""
        mine = next(one for one in self._workers if one is worker)
        self._workers.remove(mine)
        await (mine.stop() if isinstance(mine, KubernetesWorker) else mine.close())

    async def stop(self) -> None:
        # The trainer first: it may push to replicas until it is told to end.
        ordered = sorted(self._workers, key=lambda worker: worker.component != "trainer")
        try:
            for worker in ordered:
                await (worker.stop() if isinstance(worker, KubernetesWorker) else worker.close())
            if self._owner is not None:
                await _delete_owned(self.api, self.manifests.labels, self._owner.uid)
                await self.api.delete(CONFIG_MAP, self._owner.name, self._owner.uid)
        except SurogateError as error:
            _log.error("a job's pods could not be deleted; the next sweep will", job=self.job.job_id, error=str(error))
            await self.release()

    async def release(self) -> None:
        for worker in self._workers:
            await (worker.release() if isinstance(worker, KubernetesWorker) else worker.close())

    @property
    def owner(self) -> Owner:
        """The anchor, as the owner of the others."""
        assert self._owner is not None, "the pool is open"
        return self._owner

    def worker_manifest(self, spec: WorkerSpec, incarnation: int) -> Object:
        """The Job of one incarnation of a worker, by the template as it is now.

        Raises:
            PermissionDeniedError: Its pod would have what no pod of a job may have.
        """
        body = self.manifests.worker(spec, incarnation, self._templates.load(spec.component), self.owner)
        check_pod(body["spec"]["template"], f"{spec.component}-{spec.index}")
        return body

    async def is_anchored(self) -> bool:
        """Whether the anchor is still there."""
        found = await self.api.find(CONFIG_MAP, self.owner.name)
        if found is None or found["metadata"].get("deletionTimestamp"):
            return False
        return bool(found["metadata"]["uid"] == self.owner.uid)

    def owns(self, item: Object) -> bool:
        """Whether an object belongs to this job: by its owner's uid, which a name alone does not prove."""
        return _owned_by(item, self.owner.uid)

    async def _jobs(self) -> list[Object]:
        found, _ = await self.api.list(JOB, labels=names.selector(self.manifests.labels))
        return [job for job in found if self.owns(job)]

    async def _anchor(self) -> Object:
        body = self.manifests.anchor(self._training_job())
        name = body["metadata"]["name"]
        while True:
            try:
                return await self.api.create(CONFIG_MAP, body)
            except AlreadyExistsError:
                found = await self.api.find(CONFIG_MAP, name)
            if found is None:
                continue
            labels = found["metadata"].get("labels") or {}
            if any(labels.get(key) != value for key, value in self.manifests.labels.items()):
                raise FailedPreconditionError(
                    f"there is a ConfigMap {name} that is not of this job: delete it, or give the job another id",
                    reason="NAME_TAKEN",
                )
            run = (found["metadata"].get("annotations") or {}).get(names.RUN)
            if run == self.job.uid and not found["metadata"].get("deletionTimestamp"):
                return found
            # What an earlier job of the same id has left: its objects must be gone before there are others of the name.
            await delete_anchor(self.api, found)

    def _training_job(self) -> Owner | None:
        """The resource that has made the job, if one has: what owns the anchor."""
        labels = self.job.labels
        if not self._settings.training_jobs or names.TRAINING_JOB_UID not in labels:
            return None
        name, uid = labels[names.TRAINING_JOB_NAME], labels[names.TRAINING_JOB_UID]
        return Owner("TrainingJob", "surogate.dev/v1alpha1", name, uid)

    async def _ensure(self, kind: Kind, body: Object) -> None:
        """Creates an object of this job, or makes sure that the one of its name is this job's."""
        try:
            await self.api.create(kind, body)
        except AlreadyExistsError:
            found = await self.api.get(kind, body["metadata"]["name"])
            if not self.owns(found):
                raise FailedPreconditionError(
                    f"there is a {kind.name} {body['metadata']['name']} that is not of this job: delete it, or give "
                    "the job another id",
                    reason="NAME_TAKEN",
                ) from None
            if "data" in body and found.get("data") != body["data"]:
                await self.api.patch(kind, body["metadata"]["name"], {"data": body["data"]})


async def delete_anchor(api: Api, anchor: Object) -> None:
    """Deletes an anchor and what it owns, and waits until that is gone."""
    uid, labels = anchor["metadata"]["uid"], {names.JOB: anchor["metadata"]["labels"][names.JOB]}
    await api.delete(CONFIG_MAP, anchor["metadata"]["name"], uid)
    try:
        async with asyncio.timeout(_GONE_SECONDS):
            while await _delete_owned(api, labels, uid):  # noqa: ASYNC110 - gone when the cluster says so
                await asyncio.sleep(_GONE_POLL)
    except TimeoutError:
        raise FailedPreconditionError(
            f"the pods of an earlier job are still ending after {_GONE_SECONDS:g} s: try again later",
            reason="LEFTOVERS",
        ) from None


async def _delete_owned(api: Api, labels: Mapping[str, str], uid: str) -> int:
    """Deletes what an anchor owns, rather than wait for the cluster to collect it; returns how much there was."""
    count = 0
    for kind in (JOB, SERVICE, CONFIG_MAP):
        found, _ = await api.list(kind, labels=names.selector(labels))
        for item in found:
            if _owned_by(item, uid):
                await api.delete(kind, item["metadata"]["name"], item["metadata"]["uid"])
                count += 1
    return count


def _owned_by(item: Object, uid: str) -> bool:
    return any(owner["uid"] == uid for owner in item["metadata"].get("ownerReferences") or [])


def _place(job: Object) -> tuple[str, int]:
    labels = job["metadata"]["labels"]
    return labels[names.COMPONENT], int(labels[names.INDEX])
