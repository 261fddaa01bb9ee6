"""One worker as a Kubernetes Job, followed through its pods and started again, under a further name, when it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator_svc.launchers.base import WorkerFailedError, WorkerSpec
from orchestrator_svc.launchers.incarnations import RestartBudget, RestartedWorker, RestartPolicy
from orchestrator_svc.launchers.kubernetes import names, words
from orchestrator_svc.launchers.kubernetes.answers import OverQuotaError
from orchestrator_svc.launchers.kubernetes.api import JOB, Object
from orchestrator_svc.launchers.kubernetes.manifests import GRPC_PORT
from orchestrator_svc.launchers.kubernetes.troubles import Troubles
from orchestrator_svc.launchers.kubernetes.words import Wait
from orchestrator_svc.metrics import WORKER_RESTARTS
from surogate.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    NotFoundError,
    SurogateError,
    UnavailableError,
    UnimplementedError,
)
from surogate.rpc import address
from surogate.rpc.channel import ClientSecurity
from surogate.telemetry.log import get_logger
from surogate.v1 import reward_pb2, reward_pb2_grpc

if TYPE_CHECKING:
    import grpc.aio

    from orchestrator_svc.launchers.kubernetes.belongings import Belongings
    from orchestrator_svc.launchers.kubernetes.mirror import Mirror

_log = get_logger("launcher")
_LOOK_SECONDS = 5.0
"""How often a worker is looked at when nothing is heard of it."""
_LOG_LINES, _KEPT_LINES = 15, 2000
_SAVE_SECONDS = 10.0
_LOG_PAUSE = 0.5
_MOVED_SECONDS = 0.5
"""Pause before a worker that the cluster ended is started again."""
_ANSWER_SECONDS, _ANSWER_PAUSE = 5.0, 0.5


class KubernetesWorker(RestartedWorker):
    """A worker through its Jobs. `launch` starts a task that keeps it alive until `stop`, or lets go at `release`."""

    def __init__(
        self,
        spec: WorkerSpec,
        belongings: Belongings,
        mirror: Mirror,
        security: ClientSecurity,
        policy: RestartPolicy,
        *,
        by_name: bool,
    ) -> None:
        """`by_name`: called by the name that its Service gives it, not by its pod's address."""
        super().__init__(spec.component, spec.index, security)
        self.spec = spec
        self._belongings = belongings
        self._api = belongings.api
        self._mirror = mirror
        self._by_name = by_name
        self._budget = RestartBudget(policy, belongings.job, self.name)
        self._incarnation = 1
        self._job: Object | None = None
        self._pod_uid = ""
        self._lost = ""
        """How the pod before ended, until another one is up within the same Job."""
        self._last_lines = ""
        self._troubles = Troubles(self._api, mirror)
        self._waited_for_room = float("-inf")
        """When it last waited for what others hold, by this process' clock."""
        self._keeper: asyncio.Task[None] | None = None

    def launch(self, found: Sequence[Object] = ()) -> None:
        """Starts the worker, or goes on with the newest of the Jobs that an earlier orchestrator made for it."""
        self._incarnation = max([1, *(incarnation_of(job) for job in found)])
        self._restarts = self._incarnation - 1
        self._keeper = asyncio.create_task(self._keep(), name=f"keep-{self.name}")

    async def release(self) -> None:
        """Lets go of the worker, which goes on."""
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        await self._closed()

    async def stop(self) -> None:
        """Deletes the worker's Job and its pods, after their logs were saved. Idempotent."""
        await self.release()
        job, self._job = self._job, None
        if job is not None:
            await self._save_logs(job)
            await self._api.delete(JOB, job["metadata"]["name"], job["metadata"]["uid"])

    async def log(self, tail: int, follow: bool) -> AsyncIterator[str]:
        """Pod after pod, node after node of a trainer."""
        seen: set[str] = set()
        while True:
            ended = not follow or self._failure is not None
            for pod in [pod for pod in self._pods() if _has_run(pod) and pod["metadata"]["uid"] not in seen]:
                seen.add(pod["metadata"]["uid"])
                async with aclosing(self._log_of_pod(pod, tail, follow)) as lines:
                    async for line in lines:
                        yield line
            if ended:
                return
            await asyncio.sleep(_LOG_PAUSE)

    async def _serving(self, channel: grpc.aio.Channel, timeout: float) -> None:
        """A service of the author's own need not answer health checks: that it answers its own contract is enough."""
        if not self.spec.image:
            await super()._serving(channel, timeout)
            return
        stub: Any = reward_pb2_grpc.RewardServiceStub(channel)
        async with asyncio.timeout(timeout):
            while True:
                try:
                    await stub.ListEnvironments(reward_pb2.ListEnvironmentsRequest(), timeout=_ANSWER_SECONDS)
                    return
                except UnimplementedError:
                    return  # a service that only scores
                except SurogateError as error:
                    _log.info("not ready yet", worker=self.name, why=str(error))
                await asyncio.sleep(_ANSWER_PAUSE)

    async def _keep(self) -> None:
        try:
            while True:
                end = await self._live()
                self._down()
                if (failure := await self._verdict(end)) is not None:
                    _log.error("worker given up", worker=self.name, how=end.text)
                    await self._tell(failure.message)
                    self._gave_up(failure)
                    return
                await self._prepare_restart(end)
        except SurogateError as error:
            failure = WorkerFailedError(f"{self.name} cannot be started: {error}")
            self._gave_up(failure)
        except Exception as error:  # noqa: BLE001 - logged, and told to whoever waits for the worker
            _log.exception("the keeper of a worker failed", worker=self.name)
            self._gave_up(WorkerFailedError(f"{self.name} could not be kept running: {error}"))

    async def _live(self) -> words.End:
        """One incarnation, to its end."""
        job = self._job = await self._create_or_adopt()
        self._mirror.put_job(job)
        self._troubles.begin()
        while True:
            changed = self._mirror.changed()
            current = await self._newest(job)
            if current is None or current["metadata"].get("deletionTimestamp"):
                self._job = None
                return await self._deleted()
            job = self._job = current
            pods = self._mirror.pods(job)
            if end := words.how_ended(job, pods):
                if not any(_failed(pod) for pod in pods):
                    pods = await self._mirror.look_up_pods(job)
                    end = words.how_ended(job, pods) or end
                await self._bury(job, pods)
                return end
            await self._observe(job, pods)
            if self._is_lost(pods):
                await self._bury(job, ())
                return words.End("was lost with its node, which does not answer", moved=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await changed.wait()

    async def _deleted(self) -> words.End:
        """The end of a worker whose Job is gone. Without the anchor the cluster collects whatever is made."""
        if await self._belongings.is_anchored():
            return words.End("was deleted by somebody", moved=True)
        return words.End(
            f"was deleted with the ConfigMap {self._belongings.owner.name}, which owns all of the job", final=True
        )

    async def _create_or_adopt(self) -> Object:
        while True:
            try:
                return await self._create_or_adopt_once()
            except OverQuotaError as error:
                text = words.over_quota(str(error))
                await self._say(Wait(f"waits: its Job cannot be created: {text}", for_room=True))
            await asyncio.sleep(_LOOK_SECONDS)

    async def _create_or_adopt_once(self) -> Object:
        body = self._belongings.worker_manifest(self.spec, self._incarnation)
        name = body["metadata"]["name"]
        found = await self._api.find(JOB, name, told=self._say_away)
        if found is None:
            try:
                return await self._api.create(JOB, body, told=self._say_away)
            except AlreadyExistsError:  # made in this moment, perhaps by this very call before its answer was lost
                found = await self._api.get(JOB, name)
        if not self._belongings.owns(found):
            raise FailedPreconditionError(
                f"there is a Job {name} that is not of this job: delete it, or give the job another id",
                reason="NAME_TAKEN",
            )
        _log.info("worker adopted", worker=self.name, job=name)
        return found

    async def _newest(self, job: Object) -> Object | None:
        """The Job as it is now. That the mirror lacks it means nothing before the API server has said so."""
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        seen = self._mirror.job(name)
        if seen is None:
            seen = await self._api.find(JOB, name)
            if seen is not None:
                self._mirror.put_job(seen)
        return seen if seen is not None and seen["metadata"]["uid"] == uid else None

    async def _observe(self, job: Object, pods: Sequence[Object]) -> None:
        """Takes note of the pod that serves, and of what keeps one from it."""
        pod = next((pod for pod in reversed(pods) if _node(pod) == 0 and _runs(pod)), None)
        uid = pod["metadata"]["uid"] if pod is not None else ""
        if self._pod_uid and uid != self._pod_uid:
            await self._note_loss(job, [one for one in pods if one["metadata"]["uid"] == self._pod_uid])
            self._down()
        if pod is not None and not self._pod_uid:
            self._pod_uid = uid
            self._came_up(self._address_of(job, pod))
            _log.info("worker is up", worker=self.name, address=self.address, generation=self.generation)
            if self._lost:
                self._restarts += 1
                await self._tell(f"{self.name} {self._lost}; it runs again in another pod (restart {self._restarts})")
                self._lost = ""
        await self._say(await self._troubles.of(job, pods, is_up=bool(self._pod_uid)))

    async def _note_loss(self, job: Object, before: Sequence[Object]) -> None:
        """Tells at once that the cluster takes the pod away: the next one may have to wait for room. How a pod ends by
        itself is told with what follows from it."""
        self._lost = words.how_pod_ended(before[0]) if before else "lost its pod"
        if queued := words.why_queued(job).text:
            self._lost = f"had to give its place up, and {queued}"
            return  # which is told as what it waits for
        if before and words.is_moved(before[0]):
            await self._tell(f"{self.name} {self._lost}; another pod will take its place")

    def _is_lost(self, pods: Sequence[Object]) -> bool:
        """Whether a pod will not come back from a node that is away, and another may run beside it. Not a trainer: two
        of them might write to one place."""
        return self.component != "trainer" and self._troubles.overdue(pods) is not None

    async def _say(self, wait: Wait) -> None:
        """Tells what the worker waits for, when that has changed."""
        if wait.for_room:
            self._waited_for_room = time.monotonic()
        if wait.text == self.status_message:
            return
        self.status_message = wait.text
        await self._tell(f"{self.name} {wait.text}" if wait.text else f"{self.name} waits no longer")

    async def _say_away(self, why: str) -> None:
        await self._say(Wait(f"waits for the API server: {why}"))

    def _excused(self) -> float:
        return self._waited_for_room

    async def _tell(self, text: str) -> None:
        with suppress(SurogateError):  # a notice that cannot be stored must not keep the worker down
            await self._belongings.job.notice(text, component=self.name)

    def _address_of(self, job: Object, pod: Object) -> str:
        if self._by_name:
            return address.join(self._belongings.manifests.host(job["metadata"]["name"], self.component), GRPC_PORT)
        return address.join(pod["status"]["podIP"], GRPC_PORT)

    def _down(self) -> None:
        self._pod_uid = ""
        self._went_down()

    async def _verdict(self, end: words.End) -> WorkerFailedError | None:
        """The error with which an ended worker is given up, or None if it is to be started again."""
        if end.final:
            return WorkerFailedError(f"{self.name} {end.text}{self._said()}")
        if not end.moved and await self._budget.spent():
            used = await self._budget.used()
            return WorkerFailedError(f"{self.name} {end.text} after {used} restarts{self._said()}")
        return None

    async def _prepare_restart(self, end: words.End) -> None:
        delay = _MOVED_SECONDS if end.moved else await self._budget.take()
        self._lost = ""
        self._incarnation += 1
        self._restarts += 1
        WORKER_RESTARTS.labels(self.component).inc()
        said = "" if end.moved else self._said()
        await self._tell(f"{self.name} {end.text}; starting it again (restart {self._restarts}){said}")
        await asyncio.sleep(delay)

    async def _bury(self, job: Object, pods: Sequence[Object]) -> None:
        """Saves the logs of an ended Job, and deletes it."""
        self._last_lines = await self._log_of([pod for pod in pods if _failed(pod)] or pods[-1:], _LOG_LINES)
        await self._save_logs(job)
        await self._api.delete(JOB, job["metadata"]["name"], job["metadata"]["uid"])
        self._job = None

    async def _save_logs(self, job: Object) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_SAVE_SECONDS):
                text = await self._log_of(self._mirror.pods(job), _KEPT_LINES)
                await asyncio.to_thread(_append, self._belongings.job.output_dir / "logs" / f"{self.name}.log", text)

    async def _log_of_pod(self, pod: Object, tail: int, follow: bool) -> AsyncGenerator[str, None]:
        name, container = pod["metadata"]["name"], words.main_container(pod)
        if not follow:
            for line in (await self._api.log(name, container=container, tail=tail)).splitlines():
                yield line
            return
        async with aclosing(self._api.follow_log(name, container=container, tail=tail)) as lines:
            with suppress(NotFoundError, UnavailableError):  # the pod is gone; another one may come
                async for line in lines:
                    yield line

    async def _log_of(self, pods: Sequence[Object], lines: int) -> str:
        texts = []
        for pod in pods:
            if not _has_run(pod):
                continue
            container = words.telling_container(pod)
            texts.append(await self._api.log(pod["metadata"]["name"], container=container, tail=lines))
        return "".join(texts)

    def _pods(self) -> Sequence[Object]:
        return self._mirror.pods(self._job) if self._job is not None else ()

    def _said(self) -> str:
        lines = self._last_lines.rstrip()
        return f"; its log ends with:\n{lines}" if lines else ""


def incarnation_of(job: Object) -> int:
    """Number of the incarnation that a Job is, from 1."""
    return int(job["metadata"]["labels"].get(names.INCARNATION, "1"))


def _runs(pod: Object) -> bool:
    status = pod.get("status") or {}
    going = pod["metadata"].get("deletionTimestamp")
    return status.get("phase") == "Running" and bool(status.get("podIP")) and not going


def _has_run(pod: Object) -> bool:
    """Whether something has run there, and may have a log."""
    status = pod.get("status") or {}
    statuses = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    return any({"running", "terminated"} & set(status.get("state") or {}) for status in statuses)


def _failed(pod: Object) -> bool:
    return bool((pod.get("status") or {}).get("phase") == "Failed")


def _node(pod: Object) -> int:
    return int((pod["metadata"].get("annotations") or {}).get(names.COMPLETION_INDEX, "0"))


def _append(file: Path, text: str) -> None:
    if text:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            out.write(text)
