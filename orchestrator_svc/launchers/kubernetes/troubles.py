"""What keeps one worker from running, as the cluster tells it: by its Job, its pods, and the events of both."""

from __future__ import annotations

import time
from collections.abc import Sequence

from orchestrator_svc.launchers.kubernetes import words
from orchestrator_svc.launchers.kubernetes.api import EVENT, Api, Object
from orchestrator_svc.launchers.kubernetes.mirror import Mirror
from orchestrator_svc.launchers.kubernetes.words import Wait
from surogate.errors import SurogateError
from surogate.telemetry.log import get_logger

NO_POD_SECONDS = 3.0
"""A Job that has had no pod for so long has a reason, which its events tell."""
SET_UP_SECONDS = 6.0
"""So long may a node take for a pod's volumes and network before the pod's events are asked why."""
_EVENT_PATIENCE = 5.0
_log = get_logger("launcher")


class Troubles:
    """Looks at one worker again and again. Times are this process' own: clocks of the cluster may be wrong."""

    def __init__(self, api: Api, mirror: Mirror) -> None:
        self._api = api
        self._mirror = mirror
        self._without_pod = 0.0
        self._first_seen: dict[tuple[str, str], float] = {}
        """When a pod was first seen to end, or to be set up, by its uid."""

    def begin(self) -> None:
        """Another Job begins."""
        self._without_pod = time.monotonic()
        self._first_seen.clear()

    def overdue(self, pods: Sequence[Object]) -> Object | None:
        """A pod that has been ending for so long that its node must be away."""
        return next((pod for pod in pods if words.why_ending(pod, self._ending_for(pod))), None)

    async def of(self, job: Object, pods: Sequence[Object], *, is_up: bool) -> Wait:
        """What is in the way now; empty if nothing is."""
        if pods or job["spec"].get("suspend"):
            self._without_pod = time.monotonic()
        waits = [words.why_queued(job), *(words.why_waiting(pod) for pod in reversed(pods))]
        if wait := next((wait for wait in waits if wait.text), None):
            return wait
        if text := next((text for pod in pods if (text := words.why_ending(pod, self._ending_for(pod)))), ""):
            return Wait(text)
        for pod in pods:
            slow = words.is_set_up(pod) and self._seen_for(pod, "set up") > SET_UP_SECONDS
            if slow and (text := words.why_not_set_up(await self._events(pod))):
                return Wait(text)
        none = not pods and time.monotonic() - self._without_pod > NO_POD_SECONDS
        if none and (wait := words.why_not_created(await self._events(job))).text:
            return wait
        if self._mirror.trouble and not is_up:
            return Wait(f"is not heard of: the API server cannot be watched: {self._mirror.trouble}")
        return Wait()

    def _ending_for(self, pod: Object) -> float:
        return self._seen_for(pod, "ending") if pod["metadata"].get("deletionTimestamp") else 0.0

    def _seen_for(self, pod: Object, how: str) -> float:
        now = time.monotonic()
        return now - self._first_seen.setdefault((pod["metadata"]["uid"], how), now)

    async def _events(self, item: Object) -> Sequence[Object]:
        fields = f"involvedObject.uid={item['metadata']['uid']}"
        try:
            events, _ = await self._api.list(EVENT, fields=fields, patience=_EVENT_PATIENCE)
        except SurogateError as error:  # words alone are lost
            _log.warning("events cannot be read", about=item["metadata"]["name"], error=str(error))
            return []
        return sorted(events, key=_when)


def _when(event: Object) -> str:
    """Time of an event. Those of a list come by name."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return str(next(filter(None, times), ""))
