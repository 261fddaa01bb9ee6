"""What a job has in the cluster: one anchor, and the objects that it owns. Nothing else is changed or deleted."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from orchestrator_svc.launchers.base import Component, Job, WorkerSpec
from orchestrator_svc.launchers.kubernetes import names
from orchestrator_svc.launchers.kubernetes.api import CONFIG_MAP, JOB, SERVICE, Api, Kind, Object
from orchestrator_svc.launchers.kubernetes.manifests import Manifests, Owner
from orchestrator_svc.launchers.kubernetes.policy import check_pod
from orchestrator_svc.launchers.kubernetes.templates import Templates
from surogate.errors import AlreadyExistsError, FailedPreconditionError, SurogateError

if TYPE_CHECKING:
    from orchestrator_svc.settings import OrchestratorSettings

_GONE_SECONDS = 120.0
_GONE_POLL = 0.25


class Belongings:
    """The objects of one job. `open` makes the anchor, or finds it."""

    def __init__(self, job: Job, api: Api, settings: OrchestratorSettings) -> None:
        self.job = job
        self.api = api
        self.manifests = Manifests(job.job_id, job.uid, job.config, settings)
        self._training_jobs = settings.training_jobs
        self._templates = Templates(settings.pod_templates)
        self._owner: Owner | None = None
        self._making: dict[Component, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def owner(self) -> Owner:
        """The anchor, as the owner of the others."""
        assert self._owner is not None, "open comes first"
        return self._owner

    async def open(self) -> None:
        """Makes the anchor, or finds it.

        Raises:
            FailedPreconditionError: Something of its name is there that is not this job's, as far as is known.
        """
        anchor = await self._anchor()
        self._owner = Owner("ConfigMap", "v1", anchor["metadata"]["name"], anchor["metadata"]["uid"])

    async def jobs(self) -> list[Object]:
        """The Kubernetes Jobs that there are."""
        found, _ = await self.api.list(JOB, labels=names.selector(self.manifests.labels))
        return [job for job in found if self.owns(job)]

    async def prepare(self, spec: WorkerSpec) -> None:
        """Makes what the workers of a component share: the Service, and the configuration of their service."""
        self.worker_manifest(spec, 1)  # what is wrong with it is told before anything is made
        async with self._making[spec.component]:
            await self._ensure(SERVICE, self.manifests.service(spec.component, self.owner))
            if spec.config is not None:
                await self._ensure(CONFIG_MAP, self.manifests.worker_config(spec, self.owner))

    def worker_manifest(self, spec: WorkerSpec, incarnation: int) -> Object:
        """The Job of one incarnation of a worker, by the template as it is now.

        Raises:
            PermissionDeniedError: Its pod would have what no pod of a job may have.
        """
        body = self.manifests.worker(spec, incarnation, self._templates.load(spec.component), self.owner)
        check_pod(body["spec"]["template"], f"{spec.component}-{spec.index}")
        return body

    async def delete(self) -> None:
        """Deletes all of it."""
        if self._owner is not None:
            await _delete_owned(self.api, self.manifests.labels, self._owner.uid)
            await self.api.delete(CONFIG_MAP, self._owner.name, self._owner.uid)

    async def is_anchored(self) -> bool:
        """Whether the anchor is still there."""
        found = await self.api.find(CONFIG_MAP, self.owner.name)
        if found is None or found["metadata"].get("deletionTimestamp"):
            return False
        return bool(found["metadata"]["uid"] == self.owner.uid)

    def owns(self, item: Object) -> bool:
        """Whether an object belongs to this job: by its owner's uid, which a name alone does not prove."""
        return _owned_by(item, self.owner.uid)

    async def _anchor(self) -> Object:
        body = self.manifests.anchor(self._training_job())
        name = body["metadata"]["name"]
        while True:
            try:
                return await self.api.create(CONFIG_MAP, body, told=self._tell_away)
            except AlreadyExistsError:
                found = await self.api.find(CONFIG_MAP, name)
            if found is None:
                continue
            run = run_of(found)
            if run == self.job.uid and not found["metadata"].get("deletionTimestamp"):
                return found
            await self._require_leftover(found, run)
            # What an earlier job of the same id has left: its objects must be gone before there are others of the name.
            await delete_anchor(self.api, found)

    async def _require_leftover(self, found: Object, run: str) -> None:
        """Makes sure that an anchor may be deleted: it is of a job of this id that is known to have ended."""
        labels = found["metadata"].get("labels") or {}
        name = found["metadata"]["name"]
        if not run or any(labels.get(key) != value for key, value in self.manifests.labels.items()):
            raise FailedPreconditionError(
                f"there is a ConfigMap {name} that is not of this job: delete it, or give the job another id",
                reason="NAME_TAKEN",
            )
        maker = self._training_job()
        same_maker = maker is not None and _owned_by(found, maker.uid)
        if run != self.job.uid and not same_maker and not await self.job.has_ended(run):
            raise FailedPreconditionError(
                f"in the cluster there is a job of the id {self.job.job_id} that the job store does not know, perhaps "
                f"at work: delete the ConfigMap {name}, with which all of it goes, or give the job another id",
                reason="NAME_TAKEN",
            )

    async def _tell_away(self, why: str) -> None:
        with suppress(SurogateError):  # a notice that cannot be stored must not keep the job from its pods
            await self.job.notice(f"the job waits for the API server: {why}")

    def _training_job(self) -> Owner | None:
        """The resource that has made the job, if one has: what owns the anchor."""
        labels = self.job.labels
        if not self._training_jobs or names.TRAINING_JOB_UID not in labels:
            return None
        name, uid = labels[names.TRAINING_JOB_NAME], labels[names.TRAINING_JOB_UID]
        return Owner("TrainingJob", "surogate.dev/v1alpha1", name, uid)

    async def _ensure(self, kind: Kind, body: Object) -> None:
        """Creates an object of this job, or makes sure that the one of its name is this job's."""
        try:
            await self.api.create(kind, body, told=self._tell_away)
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


def run_of(anchor: Object) -> str:
    """Which job of its id an anchor belongs to; empty for a ConfigMap that is no anchor."""
    return str((anchor["metadata"].get("annotations") or {}).get(names.RUN, ""))
