"""The workers of one job as Kubernetes Jobs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator_svc.launchers.base import Component, Job, Worker, WorkerPool, WorkerSpec
from orchestrator_svc.launchers.incarnations import RestartPolicy
from orchestrator_svc.launchers.kubernetes import names
from orchestrator_svc.launchers.kubernetes.api import JOB, Api, Object
from orchestrator_svc.launchers.kubernetes.belongings import Belongings
from orchestrator_svc.launchers.kubernetes.mirror import Mirror
from orchestrator_svc.launchers.kubernetes.worker import KubernetesWorker
from orchestrator_svc.launchers.static import StaticWorker
from surogate.errors import SurogateError
from surogate.rpc.channel import ClientSecurity
from surogate.telemetry.log import get_logger

if TYPE_CHECKING:
    from orchestrator_svc.settings import OrchestratorSettings

_log = get_logger("launcher")


class KubernetesPool(WorkerPool):
    """The Jobs of one job. They outlive the orchestrator: the next one finds them again by their names and labels."""

    ends_workers = False

    def __init__(
        self, job: Job, api: Api, mirror: Mirror, settings: OrchestratorSettings, security: ClientSecurity
    ) -> None:
        self._job = job
        self._api = api
        self._mirror = mirror
        self._security = security
        self._settings = settings
        self._belongings = Belongings(job, api, settings)
        self._policy = RestartPolicy(max_restarts=settings.max_worker_restarts)
        self._found: dict[tuple[str, int], list[Object]] = defaultdict(list)
        self._workers: list[KubernetesWorker | StaticWorker] = []

    @property
    def workers(self) -> Sequence[Worker]:
        return self._workers

    def count(self, component: Component, wanted: int) -> int:
        return wanted

    async def open(self) -> None:
        """Makes the anchor, or finds it and what hangs on it."""
        await self._belongings.open()
        for found in await self._belongings.jobs():
            self._found[_place(found)].append(found)

    async def start(self, spec: WorkerSpec) -> Worker:
        if spec.component == "reward" and not spec.image and self._settings.reward_address:
            shared = self._settings.reward_address
            static = StaticWorker("reward", spec.index, shared, self._security, self._settings.worker_wait)
            self._workers.append(static)
            static.follow()
            return static
        await self._belongings.prepare(spec)
        # A service of the author's own image gets no token of the operator's.
        security = ClientSecurity() if spec.image else self._security
        by_name = self._settings.worker_addresses == "dns"
        worker = KubernetesWorker(spec, self._belongings, self._mirror, security, self._policy, by_name=by_name)
        found = self._found.pop((spec.component, spec.index), [])
        newest = max(found, key=lambda job: int(job["metadata"]["labels"][names.INCARNATION]), default=None)
        for old in found:
            if old is not newest:
                await self._api.delete(JOB, old["metadata"]["name"], old["metadata"]["uid"])
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
            await self._belongings.delete()
        except SurogateError as error:
            _log.error("a job's pods could not be deleted; the next sweep will", job=self._job.job_id, error=str(error))
            await self.release()

    async def release(self) -> None:
        for worker in self._workers:
            await (worker.release() if isinstance(worker, KubernetesWorker) else worker.close())


def _place(job: Object) -> tuple[str, int]:
    labels = job["metadata"]["labels"]
    return labels[names.COMPONENT], int(labels[names.INDEX])
