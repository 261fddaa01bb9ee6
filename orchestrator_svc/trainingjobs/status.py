"""The status of a TrainingJob, and its events, from the job that it stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from orchestrator_svc.jobstore.messages import ENDED
from orchestrator_svc.launchers.kubernetes import names
from orchestrator_svc.launchers.kubernetes.api import Object
from surogate.v1 import job_pb2

_State = job_pb2.Job
_LONGEST = 1000


def status_of(job: Any, resource: Object, selector: str, sequence: int) -> Object:
    """The status of a resource whose job has this row; `sequence` is the last event that was told."""
    state = job_pb2.Job.State.Name(job.state).removeprefix("STATE_").capitalize()
    found: Object = {
        "observedGeneration": _generation(resource),
        "job": f"jobs/{job.job_id}",
        "state": state,
        "message": job.status_message[:_LONGEST],
        "step": job.step,
        "maxSteps": job.max_steps,
        "policyVersion": job.policy_version,
        "inferenceReplicas": sum(worker["component"] == "inference" for worker in job.workers),
        "selector": selector,
        "outputDir": job.output_dir,
        "checkpoint": job.checkpoint,
        "metrics": {name: value for name, value in job.metrics.items() if math.isfinite(value)},
        "workers": job.workers,
        "eventSequence": sequence,
        "conditions": _conditions(
            resource,
            {
                "Accepted": (True, "Accepted", ""),
                "Running": (job.state == _State.STATE_RUNNING, state, ""),
                "Complete": (job.state == _State.STATE_SUCCEEDED, state, ""),
                "Failed": (
                    job.state in ENDED and job.state != _State.STATE_SUCCEEDED,
                    state,
                    job.status_message if job.state in ENDED else "",
                ),
            },
        ),
    }
    for key, value in (("startTime", job.start_time), ("endTime", job.end_time)):
        if value is not None:
            found[key] = _time(value)
    return found


def refused(resource: Object, reason: str, message: str) -> Object:
    """The status of a resource that no job can be made of, or whose change cannot be followed."""
    before = resource.get("status") or {}
    conditions = _conditions(resource, {"Accepted": (False, reason, message)})
    kept = [one for one in before.get("conditions") or [] if one["type"] != "Accepted"]
    found = {**before, "observedGeneration": _generation(resource), "conditions": [*conditions, *kept]}
    if not before.get("job"):
        found |= {"state": "Refused", "message": message[:_LONGEST]}
    return found


def refusal_of(resource: Object) -> Object | None:
    """The condition that says that the resource, as it is now, was refused; it stays until the resource changes."""
    for condition in (resource.get("status") or {}).get("conditions") or []:
        if condition["type"] == "Accepted" and condition["status"] == "False":
            found: Object = condition
            return found if condition.get("observedGeneration") == _generation(resource) else None
    return None


def selector_of(instance: str, job_id: str) -> str:
    """The pods that the scale of a TrainingJob is about."""
    return names.selector({**names.job_labels(instance, job_id), names.COMPONENT: "inference"})


def event_of(resource: Object, key: str, reason: str, message: str, *, warning: bool) -> Object:
    """An Event about a resource; the same key again is the same event."""
    metadata = resource["metadata"]
    now = _time(datetime.now(UTC).timestamp())
    return {
        "metadata": {
            "name": f"{metadata['name'][:200].rstrip('-.')}.{metadata['uid'][:8]}-{key}",
            "namespace": metadata["namespace"],
        },
        "involvedObject": {
            "apiVersion": resource["apiVersion"],
            "kind": resource["kind"],
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
        },
        "reason": reason,
        "message": message[:_LONGEST],
        "type": "Warning" if warning else "Normal",
        "source": {"component": names.MANAGER},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }


def events_of(resource: Object, happened: Sequence[job_pb2.JobEvent]) -> list[Object]:
    """What of a job's history is worth an Event: changes of its state, checkpoints, and what people should read."""
    found = []
    for event in happened:
        key = str(event.sequence)
        if event.HasField("state_changed") and event.state_changed.state:
            state = job_pb2.Job.State.Name(event.state_changed.state).removeprefix("STATE_").capitalize()
            failed = event.state_changed.state == _State.STATE_FAILED
            found.append(event_of(resource, key, state, event.state_changed.status_message, warning=failed))
        elif event.HasField("notice"):
            warning = event.notice.severity != job_pb2.Notice.SEVERITY_INFO
            found.append(event_of(resource, key, "Notice", event.notice.text, warning=warning))
        elif event.HasField("checkpoint_saved"):
            saved = event.checkpoint_saved
            text = f"checkpoint of step {saved.step}: {saved.path}"
            found.append(event_of(resource, key, "CheckpointSaved", text, warning=False))
    return found


def _conditions(resource: Object, wanted: dict[str, tuple[bool, str, str]]) -> list[Object]:
    """Conditions; the time of one is that of its last change."""
    before = {one["type"]: one for one in (resource.get("status") or {}).get("conditions") or []}
    now = _time(datetime.now(UTC).timestamp())
    found = []
    for kind, (is_so, reason, message) in wanted.items():
        status = "True" if is_so else "False"
        old = before.get(kind, {})
        since = old["lastTransitionTime"] if old.get("status") == status else now
        found.append(
            {
                "type": kind,
                "status": status,
                "reason": reason,
                "message": message[:_LONGEST],
                "lastTransitionTime": since,
                "observedGeneration": _generation(resource),
            }
        )
    return found


def _generation(resource: Object) -> int:
    return int(resource["metadata"].get("generation", 1))


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
