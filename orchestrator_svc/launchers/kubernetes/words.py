"""What the cluster says of a worker, in words: why its pod does not run yet, and how it ended. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator_svc.launchers.kubernetes.api import Object
from orchestrator_svc.launchers.kubernetes.names import MAIN_CONTAINER, QUEUE

_PULL = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"})
_SET_UP = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PreStartHookError"})
_NODE_TROUBLE = frozenset(
    {"FailedMount", "FailedAttachVolume", "FailedMapVolume", "FailedCreatePodSandBox", "NetworkNotReady"}
)
OVERDUE_SECONDS = 30.0
"""Beyond its grace period: a pod that is still ending then has a node that is away."""
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


@dataclass(frozen=True)
class Wait:
    """What a worker waits for before it can run."""

    text: str = ""
    """`cannot be scheduled: …`, to go behind the worker's name; empty if nothing is in its way."""
    for_room: bool = False
    """Whether it waits for what others hold, which takes as long as it takes: quota, a queue, nodes."""


def why_waiting(pod: Object) -> Wait:
    """Why a pod does not run, as far as somebody could do something about it."""
    condition = _condition(pod, "PodScheduled")
    if condition and condition.get("status") == "False":
        return Wait(_unscheduled(pod, condition), for_room=True)
    return Wait(_why_not_started(pod))


def is_set_up(pod: Object) -> bool:
    """Whether a pod has a node that has not begun to run anything in it."""
    if _ends(pod) or (pod.get("status") or {}).get("phase") != "Pending":
        return False
    scheduled = _condition(pod, "PodScheduled", "True")
    states = [status.get("state") or {} for status in _container_statuses(pod)]
    return bool(scheduled) and not any({"running", "terminated"} & set(state) for state in states)


def why_not_set_up(events: Sequence[Object]) -> str:
    """Why a node cannot begin to run a pod, from the pod's events; empty if they do not tell."""
    for event in reversed(events):
        if event.get("type") == "Warning" and event.get("reason") in _NODE_TROUBLE and event.get("message"):
            return f"cannot be started on its node: {_short(str(event['message']))}"
    return ""


def why_ending(pod: Object, seconds: float) -> str:
    """That a pod has been ending for so long that its node must be away; empty while that is usual."""
    grace = float(pod["metadata"].get("deletionGracePeriodSeconds") or 0)
    if not _ends(pod) or seconds < grace + OVERDUE_SECONDS:
        return ""
    node = (pod["spec"].get("nodeName")) or "its node"
    return (
        f"cannot leave {node}, which does not answer: its pod {pod['metadata']['name']} has been ending for "
        f"{seconds:.0f} s; it is replaced when the node is back, or is deleted, or, if it is surely off, after "
        f"`kubectl delete pod {pod['metadata']['name']} --force`"
    )


def _why_not_started(pod: Object) -> str:
    for status in _container_statuses(pod):
        waiting = (status.get("state") or {}).get("waiting")
        if waiting and (text := _waiting(pod, status, waiting)):
            return text
    return ""


def why_queued(job: Object) -> Wait:
    """What a suspended Job waits for."""
    if not job["spec"].get("suspend"):
        return Wait()
    queue = (job["metadata"].get("labels") or {}).get(QUEUE)
    return Wait(f"waits for quota in the queue {queue}" if queue else "is suspended", for_room=True)


def why_not_created(events: Sequence[Object]) -> Wait:
    """Why a Job has no pod, from its events."""
    for event in reversed(events):
        if event.get("reason") in {"FailedCreate", "FailedKueue", "Pending"} and event.get("message"):
            message = str(event["message"])
            quota = over_quota(message)
            return Wait(f"its pod cannot be created: {quota or _short(message)}", for_room=bool(quota))
    return Wait()


def over_quota(message: str) -> str:
    """`over the quota NAME, requested: …` if that is what an API server's refusal says; else empty."""
    quota = re.search(r"exceeded quota: ([\w.-]+)(.*)", message)
    return f"over the quota {quota[1]}{_short(quota[2])}" if quota else ""


def how_ended(job: Object, pods: Sequence[Object]) -> End | None:
    """How a Job ended, or None while it goes on. FailureTarget and SuccessCriteriaMet announce an end, and are none.

    A worker whose container ended has ended, also where others in its pod, which somebody put beside it, go on.
    """
    if condition := _condition(job, "Failed", "True"):
        return _failed(job, pods, condition)
    if _condition(job, "Complete", "True"):
        moved = any(_condition(pod, "DisruptionTarget", "True") for pod in pods)
        return End(_disruption(pods) if moved else "ended by itself", moved=moved)
    if left := next((pod for pod in pods if _goes_on_without_worker(pod)), None):
        return End(how_pod_ended(left), final=_asks_the_impossible(left))
    return None


def how_pod_ended(pod: Object) -> str:
    """How a pod ended that is no longer there to be used: `was killed for using more memory than its limit (2Gi)`."""
    if (pod.get("status") or {}).get("reason") == "Evicted":
        return f"was evicted from its node: {_short(pod['status'].get('message', ''))}"
    status, ended = _ended_container(pod)
    moved = _condition(pod, "DisruptionTarget", "True")
    if ended and (not moved or ended.get("reason") == "OOMKilled"):
        return _terminated(pod, status["name"], ended) or "ended"
    if moved:
        return _disruption([pod])
    if _ends(pod):
        return "was deleted by somebody"
    return "ended"


def main_container(pod: Object) -> str:
    """Name of the container that is the worker. It is the first of the template's, but others may come before it: those
    that an admission webhook has put there."""
    named = (pod["metadata"].get("annotations") or {}).get(MAIN_CONTAINER)
    names = [str(container["name"]) for container in pod["spec"]["containers"]]
    return named if named in names else names[0]


def telling_container(pod: Object) -> str:
    """Name of the container whose log says most: the one that failed, else the worker."""
    status, ended = _ended_container(pod)
    return str(status["name"]) if ended and ended.get("exitCode") else main_container(pod)


def is_moved(pod: Object) -> bool:
    """Whether the cluster takes a pod away, and another comes in its place."""
    return bool(_condition(pod, "DisruptionTarget", "True"))


def _ends(pod: Object) -> bool:
    return bool(pod["metadata"].get("deletionTimestamp"))


def _goes_on_without_worker(pod: Object) -> bool:
    """Whether the worker's container has ended, and others keep the pod from ending."""
    if (pod.get("status") or {}).get("phase") != "Running" or _ends(pod):
        return False
    statuses = {one["name"]: one.get("state") or {} for one in pod["status"].get("containerStatuses") or []}
    main = statuses.pop(main_container(pod), {})
    return "terminated" in main and any("running" in state for state in statuses.values())


def _ended_container(pod: Object) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The container by which a pod ended, and how that ended: one that failed, the worker before others; else the
    worker."""
    found = []
    for status in _container_statuses(pod):
        states = [state or {} for state in (status.get("state"), status.get("lastState"))]
        if ended := next((state["terminated"] for state in states if "terminated" in state), None):
            found.append((status, ended))
    main = main_container(pod)
    found.sort(key=lambda one: (not one[1].get("exitCode"), one[0]["name"] != main))
    worst = found[0] if found else None
    if worst is None or (not worst[1].get("exitCode") and worst[0]["name"] != main):
        return {}, {}
    return worst


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
        how = _how(pod, status["name"], ended) or "ended"
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
    status, ended = _ended_container(pod)
    return bool(ended) and status["name"] == main_container(pod) and ended.get("exitCode") == 2


def _terminated(pod: Object, container: str, ended: Mapping[str, Any]) -> str:
    how = _how(pod, container, ended)
    return how if not how or container == main_container(pod) else f"failed: its container {container} {how}"


def _how(pod: Object, container: str, ended: Mapping[str, Any]) -> str:
    if ended.get("reason") == "OOMKilled":
        limit = _memory_limit(pod, container)
        return f"was killed for using more memory than its limit{f' ({limit})' if limit else ''}: raise it"
    code = ended.get("exitCode")
    if code is None:
        return ""
    message = _short(str(ended.get("message") or ""))
    how = f"was killed by signal {ended['signal']}" if ended.get("signal") else f"ended with exit code {code}"
    return f"{how}{f': {message}' if message else ''}"


def _memory_limit(pod: Object, container: str) -> str | None:
    containers = [*(pod["spec"].get("initContainers") or []), *pod["spec"]["containers"]]
    found: Object = next((item for item in containers if item["name"] == container), {})
    limits: Object = (found.get("resources") or {}).get("limits") or {}
    return limits.get("memory")


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
