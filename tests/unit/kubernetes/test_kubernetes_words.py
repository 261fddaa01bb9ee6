"""What a cluster says, in words: from answers that a real API server gave (tests/data/kubernetes), and from others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator_svc.launchers.kubernetes.words import (
    Wait,
    how_ended,
    how_pod_ended,
    is_set_up,
    main_container,
    telling_container,
    why_ending,
    why_not_created,
    why_not_set_up,
    why_queued,
    why_waiting,
)

RECORDED = Path(__file__).parents[2] / "data" / "kubernetes"


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
    assert why_waiting(item) == Wait(text, for_room=True)


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
    assert why_waiting(pod(conditions=[condition])).text == f"cannot be scheduled: {text}"


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
    waiting = {"state": {"waiting": {"reason": reason, "message": "not found"}}}
    assert why_waiting(pod(container=waiting)) == Wait(text)


def test_a_crash_loop_says_how_it_crashes() -> None:
    state = {"waiting": {"reason": "CrashLoopBackOff"}}
    last = {"terminated": {"exitCode": 3, "reason": "Error"}}
    text = "its container worker ended with exit code 3 again and again (4 restarts)"
    assert why_waiting(pod(container={"state": state, "lastState": last})).text == text


def test_a_suspended_job_names_its_queue() -> None:
    assert why_queued(recorded("job-suspended-create")) == Wait("is suspended", for_room=True)
    queued = job(suspend=True)
    queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "research"
    assert why_queued(queued).text == "waits for quota in the queue research"
    assert why_queued(recorded("job-final-susp")) == Wait()


def test_quota_is_told_by_the_jobs_events() -> None:
    message = (
        'Error creating: pods "x" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=8, used: 8'
    )
    text = "its pod cannot be created: over the quota gpus, requested: requests.nvidia.com/gpu=8, used: 8"
    assert why_not_created([{"reason": "FailedCreate", "message": message}]) == Wait(text, for_room=True)
    assert why_not_created([{"reason": "SuccessfulCreate", "message": "Created pod"}]) == Wait()
    denied = 'Error creating: admission webhook "policy.example.org" denied the request: images must be signed'
    assert why_not_created([{"reason": "FailedCreate", "message": denied}]) == Wait(
        f"its pod cannot be created: {denied}"
    )


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


def crowded(*, phase: str = "Failed", init: Any = None, worker: Any = None, sidecar: Any = None, **more: Any) -> Any:
    """A pod in which somebody has put containers before the worker, and what became of each."""
    names = {"init": init, "sidecar": sidecar, "worker": worker}
    limits = {"resources": {"limits": {"memory": "64Mi"}}}
    found = pod(phase=phase)
    found["spec"] = {
        "initContainers": [{"name": "init", **limits}],
        "containers": [{"name": name, **limits} for name in ("sidecar", "worker")],
        **more,
    }
    found["metadata"]["annotations"] = {"kubectl.kubernetes.io/default-container": "worker"}
    statuses = {name: {"name": name, "state": state} for name, state in names.items() if state}
    found["status"]["initContainerStatuses"] = [statuses.pop("init")] if init else []
    found["status"]["containerStatuses"] = list(statuses.values())
    return found


def exited(code: int, reason: str = "Error") -> Any:
    return {"terminated": {"exitCode": code, "reason": "Completed" if code == 0 else reason}}


RUNNING = {"running": {}}


@pytest.mark.parametrize(
    ("item", "text", "tells"),
    [
        (
            crowded(init=exited(0), worker=exited(137, "OOMKilled"), sidecar=exited(0)),
            "was killed for using more memory than its limit (64Mi): raise it",
            "worker",
        ),
        (
            crowded(init=exited(7), worker={"waiting": {"reason": "PodInitializing"}}),
            "failed: its container init ended with exit code 7",
            "init",
        ),
        (
            crowded(init=exited(0), worker=exited(0), sidecar=exited(137, "OOMKilled")),
            "failed: its container sidecar was killed for using more memory than its limit (64Mi): raise it",
            "sidecar",
        ),
        (crowded(init=exited(0), worker=exited(1), sidecar=exited(2)), "ended with exit code 1", "worker"),
        (crowded(init=exited(0), worker=exited(0), sidecar=exited(0)), "ended with exit code 0", "worker"),
    ],
)
def test_of_several_containers_the_one_that_failed_is_named(item: Any, text: str, tells: str) -> None:
    assert (how_pod_ended(item), telling_container(item)) == (text, tells)
    end = how_ended(job("Failed", "BackoffLimitExceeded"), [item])
    assert end is not None and not end.final, "another container's code says nothing of the worker's configuration"


def test_a_worker_that_ended_beside_one_that_goes_on_has_ended() -> None:
    """A sidecar that an admission webhook puts in keeps the pod Running, and its Job from ending."""
    alone = crowded(phase="Running", init=exited(0), worker=exited(1), sidecar=RUNNING)
    end = how_ended(job(), [alone])
    assert end is not None and end.text == "ended with exit code 1"
    both = crowded(phase="Running", init=exited(0), worker=RUNNING, sidecar=exited(1))
    assert how_ended(job(), [both]) is None
    alone["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert how_ended(job(), [alone]) is None, "it is being drained: its Job will say so"


def test_the_worker_is_known_among_others() -> None:
    item = crowded()
    assert main_container(item) == "worker"
    del item["metadata"]["annotations"]
    assert main_container(item) == "sidecar", "the first, where nothing says otherwise"


def test_a_node_that_cannot_set_a_pod_up_is_told_by_the_pods_events() -> None:
    scheduled = {"type": "PodScheduled", "status": "True"}
    waiting = {"state": {"waiting": {"reason": "ContainerCreating"}}}
    item = pod(container=waiting, conditions=[scheduled], phase="Pending")
    assert is_set_up(item) and not is_set_up(pod(phase="Pending")) and not is_set_up(pod(container={"state": RUNNING}))
    events = [
        {"type": "Normal", "reason": "Scheduled", "message": "Successfully assigned"},
        {"type": "Warning", "reason": "FailedMount", "message": 'secret "hub" not found'},
        {"type": "Warning", "reason": "BackOff", "message": "Back-off"},
    ]
    assert why_not_set_up(events) == 'cannot be started on its node: secret "hub" not found'
    assert why_not_set_up(events[:1]) == ""


def test_a_pod_that_does_not_end_has_a_node_that_is_away() -> None:
    item = pod(phase="Running")
    item["spec"]["nodeName"] = "node-7"
    assert why_ending(item, 1000) == ""
    item["metadata"] |= {"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 180}
    assert why_ending(item, 200) == "", "it may take its grace period, and some more"
    assert "cannot leave node-7, which does not answer: its pod p has been ending for 211 s" in why_ending(item, 211)
