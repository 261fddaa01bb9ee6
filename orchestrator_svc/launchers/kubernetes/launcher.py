"""Workers as pods of a Kubernetes cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from orchestrator_svc.launchers.base import Job, Known, Launcher, Run, WorkerPool
from orchestrator_svc.launchers.kubernetes import names
from orchestrator_svc.launchers.kubernetes.api import CONFIG_MAP, Api, Object
from orchestrator_svc.launchers.kubernetes.belongings import delete_anchor, run_of
from orchestrator_svc.launchers.kubernetes.mirror import Mirror
from orchestrator_svc.launchers.kubernetes.pool import KubernetesPool
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
        self._strangers: set[Run] = set()

    async def prepare(self) -> None:
        """Looks for the client and the way to the cluster; whether the API server answers is another matter."""
        await self._connect()

    async def open(self, job: Job) -> WorkerPool:
        await self._connect()
        pool = KubernetesPool(job, self.api, self.mirror, self._settings, self._security)
        await pool.open()
        return pool

    async def reap(self, job_id: str, uid: str) -> None:
        """Deletes what the job has left in the cluster."""
        try:
            await self._connect()
            anchor = await self.api.find(CONFIG_MAP, names.stem(job_id))
            labels = (anchor or {}).get("metadata", {}).get("labels") or {}
            mine = names.job_labels(self._settings.instance, job_id)
            if anchor is None or run_of(anchor) != uid or any(labels.get(key) != mine[key] for key in mine):
                return
            await delete_anchor(self.api, anchor)
        except SurogateError as error:
            _log.warning("a job's leftovers could not be deleted; the next sweep will", job=job_id, error=str(error))

    async def sweep(self, known: Known) -> None:
        """Deletes what is left of jobs that are known to have ended: the API server was away then.

        A job that the store does not know may be at work for another store, or the store was emptied: it is told, and
        left alone.
        """
        await self._connect()
        found, _ = await self.api.list(CONFIG_MAP, labels=f"{self._labels},{names.JOB}")
        anchors = {(one["metadata"]["labels"][names.JOB], run_of(one)): one for one in found if run_of(one)}
        if not anchors:
            return
        ended = await known([job_id for job_id, _ in anchors])  # after the list: jobs are stored before their anchors
        for run, anchor in anchors.items():
            if ended.get(run):
                _log.info("deleting what an ended job has left", job=run[0])
                await delete_anchor(self.api, anchor)
        self._tell_strangers({run: anchors[run] for run in anchors.keys() - ended.keys()})

    def _tell_strangers(self, anchors: Mapping[Run, Object]) -> None:
        """Says once of each job that it is not in the store."""
        for run in sorted(anchors.keys() - self._strangers):
            what = "a job in the cluster is not in the job store, and is left alone; its ConfigMap owns all of it"
            _log.warning(what, job=run[0], config_map=anchors[run]["metadata"]["name"])
        self._strangers = set(anchors)

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
