"""What a cluster says, in words: from answers that a real API server gave (tests/data/kubernetes), and from others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator_svc.launchers.kubernetes.words import (
    how_ended,
    how_pod_ended,
    why_not_created,
    why_queued,
    why_waiting,
)

RECORDED = Path(__file__).parents[1] / "data" / "kubernetes"


def recorded(name: str) -> Any:
    return json.loads((RECORDED / f"{name}.json").read_text())["body"]


def pod(*, container: dict[str, Any] | None = None, conditions: Any = (), **status: Any) -> Any:
    statuses = [{"name": "worker", "image": "registry/surogate:1", "restartCount": 4, **container}] if container else []
    resources = {"limits": {"memory": "2Gi"}}
    return {
        "metadata": {"name": "p", "uid": "u"},
        "spec": {"containers": [{"name": "worker", "image": "registry/surogate:1", "resources": resources}]},
        "status": {"conditions": list(conditions), "containerStatuses": statuses, **status},
    }


def terminated(**how: Any) -> Any:
    return pod(container={"state": {"terminated": how}}, phase="Failed")


def job(kind: str = "", reason: str = "", *, announced: str = "", **spec: Any) -> Any:
    conditions = [
        {"type": name, "status": "True", "reason": reason, "message": ""} for name in (announced, kind) if name
    ]
    return {"metadata": {"name": "j", "labels": {}}, "spec": spec, "status": {"conditions": conditions}}


def test_unschedulable_names_the_resource_from_the_pods_own_condition() -> None:
    [item] = recorded("pods-of-huge")["items"]
    text = "cannot be scheduled: of 3 nodes, 3 have too little nvidia.com/gpu (it asks for 64)"
    assert why_waiting(item) == text


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (
            "0/4 nodes are available: 1 Insufficient memory, 3 node(s) had untolerated taint {gpu: present}.",
            "of 4 nodes, 1 have too little memory (it asks for 2Gi), 3 have the taint gpu, which it does not tolerate",
        ),
        (
            "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector. preemption: 0/2 nodes are",
            "of 2 nodes, 2 do not match its node selector",
        ),
        (
            "0/3 nodes are available: 3 node(s) had untolerated taint(s).",
            "of 3 nodes, 3 have taints, which it does not tolerate",
        ),
        ('persistentvolumeclaim "models" not found', 'persistentvolumeclaim "models" not found'),
    ],
)
def test_other_reasons_not_to_be_scheduled(message: str, text: str) -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    assert why_waiting(pod(conditions=[condition])) == f"cannot be scheduled: {text}"


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("ImagePullBackOff", "cannot pull the image registry/surogate:1: not found"),
        ("ErrImagePull", "cannot pull the image registry/surogate:1: not found"),
        ("CreateContainerConfigError", "its container worker cannot be started: not found"),
        ("ContainerCreating", ""),
    ],
)
def test_waiting_containers(reason: str, text: str) -> None:
    assert why_waiting(pod(container={"state": {"waiting": {"reason": reason, "message": "not found"}}})) == text


def test_a_crash_loop_says_how_it_crashes() -> None:
    state = {"waiting": {"reason": "CrashLoopBackOff"}}
    last = {"terminated": {"exitCode": 3, "reason": "Error"}}
    text = "its container worker ended with exit code 3 again and again (4 restarts)"
    assert why_waiting(pod(container={"state": state, "lastState": last})) == text


def test_a_suspended_job_names_its_queue() -> None:
    assert why_queued(recorded("job-suspended-create")) == "is suspended"
    queued = job(suspend=True)
    queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "research"
    assert why_queued(queued) == "waits for quota in the queue research"
    assert why_queued(recorded("job-final-susp")) == ""


def test_quota_is_told_by_the_jobs_events() -> None:
    message = (
        'Error creating: pods "x" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=8, used: 8'
    )
    text = "its pod cannot be created: over the quota gpus, requested: requests.nvidia.com/gpu=8, used: 8"
    assert why_not_created([{"reason": "FailedCreate", "message": message}]) == text
    assert why_not_created([{"reason": "SuccessfulCreate", "message": "Created pod"}]) == ""


@pytest.mark.parametrize("announced", ["FailureTarget", "SuccessCriteriaMet"])
def test_an_announced_end_is_none(announced: str) -> None:
    assert how_ended(job(announced, "BackoffLimitExceeded"), []) is None


def test_recorded_ends() -> None:
    [failed] = recorded("pods-after-delete-no-policy")["items"]
    end = how_ended(recorded("job-final-fail"), [failed])
    assert end is not None and (end.text, end.final, end.moved) == ("ended with exit code 3", False, False)
    late = how_ended(recorded("job-final-dead"), [])
    assert late is not None and late.final
    assert late.text == "ran longer than it may (cluster.max_runtime: 3 s)"
    done = how_ended(recorded("job-final-ok"), [])
    assert done is not None and (done.text, done.moved) == ("ended by itself", False)


@pytest.mark.parametrize(
    ("ended", "text"),
    [
        (
            terminated(exitCode=137, reason="OOMKilled"),
            "was killed for using more memory than its limit (2Gi): raise it",
        ),
        (terminated(exitCode=139, signal=11, reason="Error"), "was killed by signal 11"),
        (terminated(exitCode=1, reason="Error", message="no GPU"), "ended with exit code 1: no GPU"),
        (
            pod(phase="Failed", reason="Evicted", message="The node was low on resource: memory."),
            "was evicted from its node: The node was low on resource: memory.",
        ),
        (
            pod(conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]),
            "made room for a pod of higher priority",
        ),
    ],
)
def test_how_pods_end(ended: Any, text: str) -> None:
    assert how_pod_ended(ended) == text


def test_a_refused_configuration_is_final() -> None:
    end = how_ended(job("Failed", "BackoffLimitExceeded"), [terminated(exitCode=2, reason="Error")])
    assert end is not None and end.final
