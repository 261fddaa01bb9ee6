"""What the cluster says of an installation's Jobs and pods, or of other objects, kept up to date by watches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from orchestrator_svc.launchers.kubernetes.answers import ApiUnavailableError, ExpiredError
from orchestrator_svc.launchers.kubernetes.api import JOB, POD, Api, Kind, Object, pause_before
from orchestrator_svc.launchers.kubernetes.names import JOB_NAME
from surogate.errors import SurogateError
from surogate.telemetry.log import get_logger

_EXPIRED_PAUSE = 0.1
_log = get_logger("kubernetes")


class Mirror:
    """Objects by name. A watch that ended begins again where it was; one that broke, is too old, or may be ahead of the
    server, with a new list.

    A server that was restored from a backup is behind the versions that it gave out before: it takes a watch from one
    of them, and says nothing until it gets there. So a watch that ends without a word, not even a bookmark, is not
    believed, and neither is one whose versions go back.

    What is here may be old by as long as the API server has been away. That something is missing here proves nothing.
    """

    def __init__(self, api: Api, labels: str, kinds: Sequence[Kind] = (JOB, POD)) -> None:
        self._api = api
        self._labels = labels
        self._objects: dict[Kind, dict[str, Object]] = {kind: {} for kind in kinds}
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._broken: dict[Kind, str] = {}

    @property
    def trouble(self) -> str:
        """Why nothing is heard of the cluster, in words; empty while it is."""
        return next(iter(self._broken.values()), "")

    def start(self) -> None:
        """Begins to follow the cluster."""
        self._tasks = [asyncio.create_task(self._follow(kind), name=f"watch-{kind.plural}") for kind in self._objects]

    async def close(self) -> None:
        """Stops following."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def job(self, name: str) -> Object | None:
        """A Job, or None if it was not seen."""
        return self._objects[JOB].get(name)

    def items(self, kind: Kind) -> Sequence[Object]:
        """All objects of a kind."""
        return list(self._objects[kind].values())

    def put_job(self, job: Object) -> None:
        """Takes in a Job that was just created or read."""
        self._put(JOB, job)

    def pods(self, job: Object) -> Sequence[Object]:
        """The pods of a Job, oldest first."""
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        mine = [pod for pod in self._objects[POD].values() if _belongs(pod, name, uid)]
        return sorted(mine, key=lambda pod: (str(pod["metadata"].get("creationTimestamp")), pod["metadata"]["name"]))

    async def look_up_pods(self, job: Object) -> Sequence[Object]:
        """The pods of a Job as the API server has them now. Jobs and pods are watched apart: that a Job has failed may
        be heard before what became of its pods."""
        found, _ = await self._api.list(POD, labels=f"{JOB_NAME}={job['metadata']['name']}")
        for pod in found:
            self._put(POD, pod)
        return self.pods(job)

    def changed(self) -> asyncio.Event:
        """An event that is set with the next change."""
        return self._changed

    async def _follow(self, kind: Kind) -> None:
        attempt = 0
        version = ""
        while True:
            try:
                if not version:
                    version = await self._list(kind)
                version = await self._watch(kind, version)
                attempt = 0
                continue
            except ExpiredError:
                pause = _EXPIRED_PAUSE
            except SurogateError as error:
                after = error.retry_after if isinstance(error, ApiUnavailableError) else None
                pause = pause_before(attempt, after)
                self._broken[kind] = str(error)
                _log.warning("a watch broke", kind=kind.plural, error=str(error), pause=round(pause, 2))
                attempt += 1
            except Exception as error:  # noqa: BLE001 - logged; a watch that ended for good would be silent for ever
                pause = pause_before(attempt, None)
                self._broken[kind] = f"what it says cannot be read: {error!r}"
                _log.exception("a watch said what cannot be read", kind=kind.plural)
                attempt += 1
            version = ""  # what happened meanwhile is in the list, whatever the watch has missed
            await asyncio.sleep(pause)

    async def _list(self, kind: Kind) -> str:
        found, version = await self._api.list(kind, labels=self._labels)
        self._objects[kind] = {item["metadata"]["name"]: item for item in found}
        self._broken.pop(kind, None)
        self._notify()
        return version

    async def _watch(self, kind: Kind, version: str) -> str:
        """Follows until the server ends the watch. Returns the version to go on from; empty is to list anew."""
        begun = version
        async with aclosing(self._api.watch(kind, version, labels=self._labels)) as events:
            async for change, item in events:
                if _is_before(item["metadata"]["resourceVersion"], version):
                    return ""
                version = item["metadata"]["resourceVersion"]
                if change == "DELETED":
                    self._objects[kind].pop(item["metadata"]["name"], None)
                    self._notify()
                elif change != "BOOKMARK":
                    self._put(kind, item)
        return version if version != begun else ""

    def _put(self, kind: Kind, item: Object) -> None:
        self._objects[kind][item["metadata"]["name"]] = item
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _is_before(version: str, other: str) -> bool:
    """Whether a resource version is an earlier one. They are numbers wherever they can be compared at all."""
    return version.isdigit() and other.isdigit() and int(version) < int(other)


def _belongs(pod: Object, job_name: str, job_uid: str) -> bool:
    metadata = pod["metadata"]
    owners = metadata.get("ownerReferences") or []
    named = (metadata.get("labels") or {}).get(JOB_NAME) == job_name
    return named and any(owner["uid"] == job_uid for owner in owners)
