"""Makes jobs of TrainingJobs, and tells in the resource how the job is.

A resource's uid is the request id of its job: however often it is seen, by however many orchestrators on one store, it
makes one job. A finalizer keeps a deleted resource until its job has been cancelled, has ended and is forgotten.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import Connection, Row, select

from orchestrator_svc.jobstore import store
from orchestrator_svc.jobstore.database import Database
from orchestrator_svc.jobstore.journal import read_events
from orchestrator_svc.jobstore.messages import ENDED
from orchestrator_svc.jobstore.scaling import scale_of
from orchestrator_svc.jobstore.schema import jobs
from orchestrator_svc.launchers.kubernetes.answers import ConflictError
from orchestrator_svc.launchers.kubernetes.api import EVENT, Api, Object
from orchestrator_svc.launchers.kubernetes.mirror import Mirror
from orchestrator_svc.launchers.kubernetes.names import OUR_LABELS, TRAINING_JOB_NAME, TRAINING_JOB_UID
from orchestrator_svc.trainingjobs.crd import TRAINING_JOB
from orchestrator_svc.trainingjobs.status import event_of, events_of, refusal_of, refused, selector_of, status_of
from surogate.config.job import GrpoJob, resolve_job
from surogate.errors import (
    AlreadyExistsError,
    InvalidInputError,
    NotFoundError,
    SurogateError,
    UnavailableError,
    Violation,
)
from surogate.telemetry.log import get_logger
from surogate.v1 import job_pb2

if TYPE_CHECKING:
    from orchestrator_svc.settings import OrchestratorSettings

FINALIZER = "surogate.dev/job"
RESYNC_SECONDS = 2.0
_PAUSE = 0.5
_EVENTS_AT_ONCE = 50
_CONFIG = ("kind", "train", "infer", "orch", "cluster")
_log = get_logger("trainingjobs")


class Jobs(Protocol):
    """The methods of JobService that are needed."""

    async def CreateJob(self, request: job_pb2.CreateJobRequest, context: Any) -> job_pb2.Job: ...  # noqa: N802

    async def CancelJob(self, request: job_pb2.CancelJobRequest, context: Any) -> job_pb2.Job: ...  # noqa: N802

    async def ScaleJob(self, request: job_pb2.ScaleJobRequest, context: Any) -> job_pb2.Job: ...  # noqa: N802

    async def DeleteJob(self, request: job_pb2.DeleteJobRequest, context: Any) -> Any: ...  # noqa: N802


class Reconciler:
    """Follows the TrainingJobs of a namespace. `start` it when jobs can be made, `close` it before that ends."""

    def __init__(self, settings: OrchestratorSettings, api: Api, database: Database, service: Jobs) -> None:
        self._settings = settings
        self._api = api
        self._database = database
        self._service = service
        self._mirror = Mirror(api, "", kinds=(TRAINING_JOB,))
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to follow. Raises ConfigError if there is no way to the cluster."""
        await self._api.open()
        self._mirror.start()
        self._task = asyncio.create_task(self._keep(), name="training-jobs")

    async def close(self) -> None:
        """Stops following; jobs go on."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self._mirror.close()
        await self._api.close()

    async def _keep(self) -> None:
        while True:
            changed = self._mirror.changed()
            for resource in self._mirror.items(TRAINING_JOB):
                try:
                    await self._reconcile(_whole(resource))
                except (ConflictError, NotFoundError):
                    pass  # it has changed meanwhile: the watch brings it again
                except SurogateError as error:
                    _log.warning("cannot reconcile", resource=resource["metadata"]["name"], error=str(error))
                except Exception:  # noqa: BLE001 - logged: what is wrong with one must not keep the others waiting
                    _log.exception("a resource cannot be reconciled", resource=resource["metadata"]["name"])
            with suppress(TimeoutError):
                async with asyncio.timeout(RESYNC_SECONDS):
                    await changed.wait()
            await asyncio.sleep(_PAUSE)  # what is written here comes back as a change

    async def _reconcile(self, resource: Object) -> None:
        uid = resource["metadata"]["uid"]
        job = await self._database.read(lambda c: _job_of(c, uid))
        if resource["metadata"].get("deletionTimestamp"):
            await self._let_go(resource, job)
            return
        finalizers = resource["metadata"].get("finalizers") or []
        if FINALIZER not in finalizers:
            resource = await self._set_finalizers(resource, [*finalizers, FINALIZER])
        if job is None:
            if not (resource.get("status") or {}).get("job"):
                await self._create(resource)
            return
        await self._mirror_job(resource, job)

    async def _create(self, resource: Object) -> None:
        """Makes the job; what is wrong with it is in the resource's status, and it is tried again when it changes."""
        status = resource.get("status") or {}
        generation = resource["metadata"].get("generation", 1)
        if status.get("state") == "Refused" and status.get("observedGeneration") == generation:
            return
        try:
            await self._service.CreateJob(self._request(resource), None)
        except UnavailableError:
            raise  # the store is away
        except SurogateError as error:
            await self._refuse(resource, error.reason, str(error))
            return
        job = await self._database.read(lambda c: _job_of(c, resource["metadata"]["uid"]))
        await self._mirror_job(resource, job)

    def _request(self, resource: Object) -> job_pb2.CreateJobRequest:
        metadata, spec = resource["metadata"], resource["spec"]
        if ours := [key for key in spec.get("labels") or {} if key.startswith(OUR_LABELS)]:
            why = f"must not begin with {OUR_LABELS}, as ours do"
            raise InvalidInputError(f"spec.labels: {ours[0]} {why}", violations=[Violation(f"labels.{ours[0]}", why)])
        labels = {**(spec.get("labels") or {}), TRAINING_JOB_NAME: metadata["name"], TRAINING_JOB_UID: metadata["uid"]}
        request = job_pb2.CreateJobRequest(job_id=metadata["name"], request_id=metadata["uid"], labels=labels)
        request.config.update({key: spec[key] for key in _CONFIG if spec.get(key) is not None})
        return request

    async def _mirror_job(self, resource: Object, job: Row[Any] | None) -> None:
        if job is None:
            return
        status = resource.get("status") or {}
        if status.get("observedGeneration") != resource["metadata"].get("generation", 1):
            await self._follow_change(resource, job)
        elif refusal_of(resource) is None:
            resource = await self._show_scale(resource, job)
        after = int(status.get("eventSequence") or 0)
        happened = await self._database.read(lambda c: read_events(c, job.job_id, after, _EVENTS_AT_ONCE))
        for event in events_of(resource, happened):
            await self._tell(event)
        sequence = happened[-1].sequence if happened else after
        new = status_of(job, resource, selector_of(self._settings.instance, job.job_id), sequence)
        new["conditions"][0] = refusal_of(resource) or new["conditions"][0]
        if new != status:
            # A merge leaves what it does not name: a metric that is no number any more is named too.
            gone = dict.fromkeys(set(status.get("metrics") or {}) - set(new["metrics"]))
            change = {**new, "metrics": {**new["metrics"], **gone}}
            await self._api.patch(TRAINING_JOB, resource["metadata"]["name"], {"status": change}, part="status")

    async def _show_scale(self, resource: Object, job: Row[Any]) -> Object:
        """Has the resource say how many replicas its job shall have, whoever said so last: without the number the API
        server answers for no scale, and whatever would scale the resource has nothing to begin with."""
        if job.state in ENDED or not isinstance(config := resolve_job(job.config), GrpoJob):
            return resource
        wanted = await self._database.read(lambda c: scale_of(c, job.job_id)) or config.infer.dp
        if resource["spec"].get("inferenceReplicas") == wanted:
            return resource
        version = resource["metadata"]["resourceVersion"]
        change = {"metadata": {"resourceVersion": version}, "spec": {"inferenceReplicas": wanted}}
        return _whole(await self._api.patch(TRAINING_JOB, resource["metadata"]["name"], change))

    async def _follow_change(self, resource: Object, job: Row[Any]) -> None:
        """Scales the job if that is what has changed; nothing else of a job can change."""
        wanted = resource["spec"].get("inferenceReplicas")
        try:
            now = await self._database.read(lambda c: scale_of(c, job.job_id))
            if wanted is not None and wanted != now and job.state not in ENDED:
                name = f"jobs/{job.job_id}"
                await self._service.ScaleJob(job_pb2.ScaleJobRequest(name=name, inference=int(wanted)), None)
            await self._service.CreateJob(self._request(resource), None)  # the same request, or it is refused
        except UnavailableError:
            raise
        except AlreadyExistsError:
            text = "the configuration of a job cannot be changed: delete the TrainingJob, and create it anew"
            await self._refuse(resource, "SpecChanged", text)
            raise ConflictError(text) from None  # what the resource says now comes with the watch
        except SurogateError as error:
            await self._refuse(resource, error.reason, str(error))
            raise ConflictError(str(error)) from error

    async def _let_go(self, resource: Object, job: Row[Any] | None) -> None:
        """Cancels and forgets the job of a deleted resource; then the resource may go."""
        finalizers = resource["metadata"].get("finalizers") or []
        if FINALIZER not in finalizers:
            return
        if job is not None:
            name = f"jobs/{job.job_id}"
            if job.state not in ENDED:
                await self._service.CancelJob(job_pb2.CancelJobRequest(name=name), None)
                await self._mirror_job(resource, await self._database.read(lambda c: store.find(c, job.job_id)))
                return
            with suppress(NotFoundError):
                await self._service.DeleteJob(job_pb2.DeleteJobRequest(name=name), None)
        await self._set_finalizers(resource, [one for one in finalizers if one != FINALIZER])

    async def _set_finalizers(self, resource: Object, finalizers: list[str]) -> Object:
        metadata = resource["metadata"]
        change = {"metadata": {"finalizers": finalizers, "resourceVersion": metadata["resourceVersion"]}}
        return _whole(await self._api.patch(TRAINING_JOB, metadata["name"], change))

    async def _refuse(self, resource: Object, reason: str, message: str) -> None:
        generation = resource["metadata"].get("generation", 1)
        await self._tell(event_of(resource, f"refused-{generation}", "Refused", message, warning=True))
        status = refused(resource, _camel(reason), message)
        await self._api.patch(TRAINING_JOB, resource["metadata"]["name"], {"status": status}, part="status")

    async def _tell(self, event: Object) -> None:
        with suppress(AlreadyExistsError):  # told before
            await self._api.create(EVENT, event)


def _job_of(connection: Connection, uid: str) -> Row[Any] | None:
    return connection.execute(select(jobs).where(jobs.c.request_id == uid)).one_or_none()


def _whole(resource: Object) -> Object:
    """A resource as it stands alone: those of a list lack their kind."""
    return {**resource, "apiVersion": TRAINING_JOB.version, "kind": TRAINING_JOB.name}


def _camel(reason: str) -> str:
    """`INVALID_CONFIG` as conditions have their reasons: `InvalidConfig`."""
    return "".join(word.capitalize() for word in reason.split("_")) if reason.isupper() else reason
