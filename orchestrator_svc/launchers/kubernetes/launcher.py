"""Workers as pods of a Kubernetes cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Set
from typing import TYPE_CHECKING

from orchestrator_svc.launchers.base import Job, Launcher, WorkerPool
from orchestrator_svc.launchers.kubernetes import names
from orchestrator_svc.launchers.kubernetes.api import CONFIG_MAP, Api
from orchestrator_svc.launchers.kubernetes.mirror import Mirror
from orchestrator_svc.launchers.kubernetes.pool import KubernetesPool, delete_anchor
from surogate.errors import SurogateError
from surogate.rpc.channel import ClientSecurity
from surogate.telemetry.log import get_logger

if TYPE_CHECKING:
    from orchestrator_svc.settings import OrchestratorSettings

_log = get_logger("launcher")


class KubernetesLauncher(Launcher):
    """Gives each job pods of its own. Tokens and certificates come from the environment (`ClientSecurity.from_env`)."""

    def __init__(self, settings: OrchestratorSettings, api: Api | None = None) -> None:
        self._settings = settings
        self._security = ClientSecurity.from_env()
        self.api = api or Api(settings.namespace, kubeconfig=settings.kubeconfig, patience=settings.api_patience)
        labels = names.selector({names.INSTANCE: settings.instance, names.MANAGED_BY: names.MANAGER})
        self.mirror = Mirror(self.api, labels)
        self._labels = labels
        self._opening = asyncio.Lock()
        self._is_open = False

    async def prepare(self) -> None:
        """Looks for the client and the way to the cluster; whether the API server answers is another matter."""
        await self._connect()

    async def open(self, job: Job) -> WorkerPool:
        await self._connect()
        pool = KubernetesPool(job, self.api, self.mirror, self._settings, self._security)
        await pool.open()
        return pool

    async def reap(self, job_id: str) -> None:
        """Deletes what a job of that id has left in the cluster."""
        try:
            await self._connect()
            anchor = await self.api.find(CONFIG_MAP, names.stem(job_id))
            labels = (anchor or {}).get("metadata", {}).get("labels") or {}
            mine = names.job_labels(self._settings.instance, job_id)
            if anchor is not None and all(labels.get(key) == value for key, value in mine.items()):
                await delete_anchor(self.api, anchor)
        except SurogateError as error:
            _log.warning("a job's leftovers could not be deleted; the next sweep will", job=job_id, error=str(error))

    async def sweep(self, active: Callable[[], Awaitable[Set[str]]]) -> None:
        """Deletes what jobs have left that are not active any more: the API server was away when they ended."""
        await self._connect()
        found, _ = await self.api.list(CONFIG_MAP, labels=f"{self._labels},{names.JOB}")
        anchors = [one for one in found if names.RUN in (one["metadata"].get("annotations") or {})]
        if not anchors:
            return
        ids = await active()  # after the list: a job is in the store before it has an anchor
        for anchor in anchors:
            job_id = anchor["metadata"]["labels"][names.JOB]
            if job_id not in ids:
                _log.info("deleting what an ended job has left", job=job_id)
                await delete_anchor(self.api, anchor)

    async def close(self) -> None:
        """Stops following the cluster."""
        await self.mirror.close()
        await self.api.close()

    async def _connect(self) -> None:
        async with self._opening:
            if not self._is_open:
                await self.api.open()
                self.mirror.start()
                self._is_open = True
