"""What the cluster says of a worker, in words: why its pod does not run yet, and how it ended. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator_svc.launchers.kubernetes.api import Object
from orchestrator_svc.launchers.kubernetes.names import QUEUE

_PULL = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"})
_SET_UP = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PreStartHookError"})
_INSUFFICIENT = re.compile(r"(\d+) Insufficient ([\w./-]+?)[.,]?(?=\s|$)")
_OF_NODES = re.compile(r"^0/(\d+) nodes are available: (.*)", re.DOTALL)
_UNTOLERATED = re.compile(r"(\d+) node\(s\) had untolerated taint(?:\(s\)|s)?(?: \{([^:}]*))?")
_AFFINITY = re.compile(r"(\d+) node\(s\) didn't match Pod's node affinity/selector")
_LONGEST = 400


@dataclass(frozen=True)
class End:
    """How one incarnation of a worker ended."""

    text: str
    """`ended with exit code 1`, to go behind the worker's name."""
    final: bool = False
    """Whether it must not be started again."""
    moved: bool = False
    """Whether the cluster ended it, and not a fault of its own."""


def why_waiting(pod: Object) -> str:
    """Why a pod does not run, as far as somebody could do something about it; empty otherwise."""
    condition = _condition(pod, "PodScheduled")
    if condition and condition.get("status") == "False":
        return _unscheduled(pod, condition)
    for status in _container_statuses(pod):
        waiting = (status.get("state") or {}).get("waiting")
        if waiting and (text := _waiting(pod, status, waiting)):
            return text
    return ""


def why_queued(job: Object) -> str:
    """What a suspended Job waits for; empty if it is not suspended."""
    if not job["spec"].get("suspend"):
        return ""
    queue = (job["metadata"].get("labels") or {}).get(QUEUE)
    return f"waits for quota in the queue {queue}" if queue else "is suspended"


def why_not_created(events: Sequence[Object]) -> str:
    """Why a Job has no pod, from its events; empty if they do not tell."""
    for event in reversed(events):
        if event.get("reason") in {"FailedCreate", "FailedKueue", "Pending"} and event.get("message"):
            message = str(event["message"])
            quota = re.search(r"exceeded quota: ([\w.-]+)(.*)", message)
            if quota:
                return f"its pod cannot be created: over the quota {quota[1]}{_short(quota[2])}"
            return f"its pod cannot be created: {_short(message)}"
    return ""


def how_ended(job: Object, pods: Sequence[Object]) -> End | None:
    """How a Job ended, or None while it goes on. FailureTarget and SuccessCriteriaMet announce an end, and are none."""
    if condition := _condition(job, "Failed", "True"):
        return _failed(job, pods, condition)
    if _condition(job, "Complete", "True"):
        moved = any(_condition(pod, "DisruptionTarget", "True") for pod in pods)
        return End(_disruption(pods) if moved else "ended by itself", moved=moved)
    return None


def how_pod_ended(pod: Object) -> str:
    """How a pod ended that is no longer there to be used: `was killed for using more memory than its limit (2Gi)`."""
    if (pod.get("status") or {}).get("reason") == "Evicted":
        return f"was evicted from its node: {_short(pod['status'].get('message', ''))}"
    for status in _container_statuses(pod):
        for state in (status.get("state"), status.get("lastState")):
            if ended := (state or {}).get("terminated"):
                if text := _terminated(pod, status["name"], ended):
                    return text
                break
    if _condition(pod, "DisruptionTarget", "True"):
        return _disruption([pod])
    if pod["metadata"].get("deletionTimestamp"):
        return "was deleted by somebody"
    return "ended"


def main_container(pod: Object) -> Object:
    """The container that is the worker: the first one."""
    container: Object = pod["spec"]["containers"][0]
    return container


def _unscheduled(pod: Object, condition: Mapping[str, Any]) -> str:
    message = str(condition.get("message", ""))
    if condition.get("reason") == "SchedulingGated":
        return "is held back by a scheduling gate"
    found = _OF_NODES.match(message)
    nodes, reasons = (found[1], found[2]) if found else ("", message)
    lacks = [
        f"{count} have too little {resource}{_asked_for(pod, resource)}"
        for count, resource in _INSUFFICIENT.findall(reasons.partition(" preemption:")[0])
    ]
    lacks += [
        f"{count} have {f'the taint {taint}' if taint else 'taints'}, which it does not tolerate"
        for count, taint in _UNTOLERATED.findall(reasons)
    ]
    lacks += [f"{count} do not match its node selector" for count in _AFFINITY.findall(reasons)]
    if not lacks:
        return f"cannot be scheduled: {_short(message) or condition.get('reason', 'no reason is given')}"
    return f"cannot be scheduled: of {nodes or 'the'} nodes, {', '.join(lacks)}"


def _asked_for(pod: Object, resource: str) -> str:
    for container in pod["spec"].get("containers") or []:
        resources = container.get("resources") or {}
        amount = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}.get(resource)
        if amount is not None:
            return f" (it asks for {amount})"
    return ""


def _waiting(pod: Object, status: Mapping[str, Any], waiting: Mapping[str, Any]) -> str:
    reason, message = waiting.get("reason", ""), _short(str(waiting.get("message", "")))
    detail = f": {message}" if message else ""
    if reason in _PULL:
        return f"cannot pull the image {status.get('image') or _image(pod, status['name'])}{detail}"
    if reason in _SET_UP:
        return f"its container {status['name']} cannot be started{detail or f': {reason}'}"
    if reason == "CrashLoopBackOff":
        ended = (status.get("lastState") or {}).get("terminated") or {}
        how = _terminated(pod, status["name"], ended) or "ended"
        return f"its container {status['name']} {how} again and again ({status.get('restartCount', 0)} restarts)"
    return ""


def _image(pod: Object, name: str) -> str:
    containers = [*(pod["spec"].get("initContainers") or []), *(pod["spec"].get("containers") or [])]
    return next((str(item.get("image", "")) for item in containers if item["name"] == name), "")


def _failed(job: Object, pods: Sequence[Object], condition: Mapping[str, Any]) -> End:
    reason = condition.get("reason", "")
    if reason == "DeadlineExceeded":
        seconds = job["spec"].get("activeDeadlineSeconds")
        return End(f"ran longer than it may (cluster.max_runtime: {seconds} s)", final=True)
    broken = [pod for pod in pods if (pod.get("status") or {}).get("phase") == "Failed"]
    if broken:
        moved = all(_condition(pod, "DisruptionTarget", "True") for pod in broken)
        return End(how_pod_ended(broken[0]), final=_asks_the_impossible(broken[0]), moved=moved)
    if reason == "BackoffLimitExceeded":
        return End("lost its pod: somebody deleted it, or its node is gone")
    return End(f"failed: {_short(str(condition.get('message') or reason))}")


def _asks_the_impossible(pod: Object) -> bool:
    """Whether the service refused its configuration, which it will again."""
    for status in _container_statuses(pod):
        ended = (status.get("state") or {}).get("terminated") or {}
        if ended.get("exitCode") == 2:
            return True
    return False


def _terminated(pod: Object, container: str, ended: Mapping[str, Any]) -> str:
    if ended.get("reason") == "OOMKilled":
        limit = next(
            (
                (item.get("resources") or {}).get("limits", {}).get("memory")
                for item in pod["spec"]["containers"]
                if item["name"] == container
            ),
            None,
        )
        return f"was killed for using more memory than its limit{f' ({limit})' if limit else ''}: raise it"
    code = ended.get("exitCode")
    if code is None or (code == 0 and _condition(pod, "DisruptionTarget", "True")):
        return ""
    if _condition(pod, "DisruptionTarget", "True"):
        return _disruption([pod])
    message = _short(str(ended.get("message") or ""))
    how = f"was killed by signal {ended['signal']}" if ended.get("signal") else f"ended with exit code {code}"
    return f"{how}{f': {message}' if message else ''}"


def _disruption(pods: Sequence[Object]) -> str:
    causes = {
        "PreemptionByScheduler": "made room for a pod of higher priority",
        "DeletionByTaintManager": "left a node that does not tolerate it any more",
        "EvictionByEvictionAPI": "was moved off a node that is drained",
        "DeletionByPodGC": "was lost with its node",
        "TerminationByKubelet": "was ended by its node",
    }
    for pod in pods:
        if condition := _condition(pod, "DisruptionTarget", "True"):
            text = causes.get(condition.get("reason", ""), "was moved off its node")
            message = _short(str(condition.get("message") or ""))
            return f"{text}{f' ({message})' if message else ''}"
    return "was moved off its node"


def _condition(item: Object, kind: str, status: str | None = None) -> Mapping[str, Any] | None:
    conditions = (item.get("status") or {}).get("conditions") or []
    return next((one for one in conditions if one["type"] == kind and status in (None, one["status"])), None)


def _container_statuses(pod: Object) -> Iterator[Mapping[str, Any]]:
    status = pod.get("status") or {}
    yield from status.get("initContainerStatuses") or []
    yield from status.get("containerStatuses") or []


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
