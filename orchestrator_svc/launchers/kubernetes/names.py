"""Names and labels of what the launcher makes: the same for the same job, and legal in DNS."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

PREFIX = "sg-"
"""Before each name: a Service's name must begin with a letter, a job's id need not."""

NAME, INSTANCE = "app.kubernetes.io/name", "app.kubernetes.io/instance"
COMPONENT, MANAGED_BY = "app.kubernetes.io/component", "app.kubernetes.io/managed-by"
JOB, INDEX, INCARNATION = "surogate.dev/job", "surogate.dev/index", "surogate.dev/incarnation"
MANAGER = "surogate-orchestrator"

RUN = "surogate.dev/run"
"""Annotation: which job of that id it is. An id can be used again when its job was deleted."""

OUR_LABELS = "surogate.dev/"
"""Beginning of the labels that nobody else may set: whose a job is, and what has made it."""

TRAINING_JOB_NAME, TRAINING_JOB_UID = "surogate.dev/training-job", "surogate.dev/training-job-uid"
"""Labels of a job (the orchestrator's) that a TrainingJob has made: that owns its anchor."""

JOB_NAME = "batch.kubernetes.io/job-name"
"""Label that a Job gives its pods."""
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
"""Annotation that an indexed Job gives its pods: the number of the node."""
MAIN_CONTAINER = "kubectl.kubernetes.io/default-container"
"""Annotation of pods: the container that is the worker, for `kubectl logs` too."""
QUEUE = "kueue.x-k8s.io/queue-name"

_LONGEST_STEM = 36
"""Leaves room for `-inference-999-999` and the Job controller's own suffixes within 63."""


def stem(job_id: str) -> str:
    """What all names of a job begin with; ids that are too long are cut, with a digest of the whole."""
    name = PREFIX + job_id
    if len(name) <= _LONGEST_STEM:
        return name
    digest = hashlib.sha256(job_id.encode()).hexdigest()[:8]
    return f"{name[: _LONGEST_STEM - 9].rstrip('-')}-{digest}"


def service_name(job_id: str, component: str) -> str:
    """Name of the headless Service of a component, and of the ConfigMap with its configuration."""
    return f"{stem(job_id)}-{component}"


def worker_name(job_id: str, component: str, index: int, incarnation: int) -> str:
    """Name of the Job of one incarnation of a worker, from 1."""
    return f"{stem(job_id)}-{component}-{index}-{incarnation}"


def instance_labels(instance: str) -> dict[str, str]:
    """Labels of everything that an installation of the orchestrator makes."""
    return {NAME: "surogate", INSTANCE: instance, MANAGED_BY: MANAGER}


def job_labels(instance: str, job_id: str) -> dict[str, str]:
    """Labels of everything that belongs to a job."""
    return {**instance_labels(instance), JOB: job_id}


def selector(labels: Mapping[str, str]) -> str:
    """Labels as the API's selectors have them."""
    return ",".join(f"{key}={value}" for key, value in labels.items())
