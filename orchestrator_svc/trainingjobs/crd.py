"""The CustomResourceDefinition of TrainingJobs: `python -m orchestrator_svc.trainingjobs.crd > k8s/base/crd.yaml`."""

from __future__ import annotations

import sys
from typing import Any

import yaml
from pydantic import BaseModel

from orchestrator_svc.launchers.kubernetes.api import Kind
from orchestrator_svc.trainingjobs.schema import ANYTHING, Schema, schema_of
from surogate.config.cluster import ClusterConfig
from surogate.config.infer import InferConfig
from surogate.config.orch import OrchConfig
from surogate.config.train import TrainConfig

GROUP, VERSION = "surogate.dev", "v1alpha1"
TRAINING_JOB = Kind("TrainingJob", f"{GROUP}/{VERSION}", "trainingjobs")

_HEAD = """\
# Made by `python -m orchestrator_svc.trainingjobs.crd`; change the models, not this file.
"""
_COLUMNS = (
    ("Kind", "string", ".spec.kind", False),
    ("State", "string", ".status.state", False),
    ("Step", "integer", ".status.step", False),
    ("Steps", "integer", ".status.maxSteps", False),
    ("Version", "integer", ".status.policyVersion", True),
    ("Replicas", "integer", ".status.inferenceReplicas", True),
    ("Message", "string", ".status.message", True),
    ("Age", "date", ".metadata.creationTimestamp", False),
)


def definition() -> dict[str, Any]:
    """The definition as an object of Kubernetes."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"trainingjobs.{GROUP}", "labels": {"app.kubernetes.io/name": "surogate"}},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": "TrainingJob",
                "listKind": "TrainingJobList",
                "plural": "trainingjobs",
                "singular": "trainingjob",
                "shortNames": ["tj"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": _schema()},
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.inferenceReplicas",
                            "statusReplicasPath": ".status.inferenceReplicas",
                            "labelSelectorPath": ".status.selector",
                        },
                    },
                    "additionalPrinterColumns": [
                        # The API server does not keep a priority of 0: written, it would differ at each apply.
                        {"name": name, "type": kind, "jsonPath": path, **({"priority": 1} if is_wide else {})}
                        for name, kind, path, is_wide in _COLUMNS
                    ],
                }
            ],
        },
    }


def _schema() -> Schema:
    return {
        "type": "object",
        "description": "A pretraining, fine-tuning or GRPO job. Its id is its name. Deleting it cancels the job.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": _spec(),
            "status": _status(),
        },
    }


def _spec() -> Schema:
    parts: dict[str, type[BaseModel]] = {
        "train": TrainConfig,
        "infer": InferConfig,
        "orch": OrchConfig,
        "cluster": ClusterConfig,
    }
    kind = {"type": "string", "enum": ["pt", "sft", "grpo"], "description": "What the job does."}
    labels = {"type": "object", "additionalProperties": {"type": "string"}, "description": "Labels of the job."}
    replicas = {
        "type": "integer",
        "minimum": 1,
        "description": "Inference replicas while the job runs (GRPO). May be changed. Unset = as infer.yaml says; the "
        "orchestrator then writes the number here, and keeps it that of the job.",
    }
    return {
        "type": "object",
        "description": "The job's configuration. Only inferenceReplicas may be changed later.",
        "required": ["kind", "train"],
        "properties": {
            "kind": kind,
            **{name: {**schema_of(model), "description": f"The keys of {name}.yaml."} for name, model in parts.items()},
            "labels": labels,
            "inferenceReplicas": replicas,
        },
    }


def _status() -> Schema:
    text, number = {"type": "string"}, {"type": "integer", "format": "int64"}
    time = {"type": "string", "format": "date-time"}
    condition = {
        "type": "object",
        "required": ["type", "status", "reason", "lastTransitionTime"],
        "properties": {
            "type": text,
            "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
            "reason": text,
            "message": text,
            "lastTransitionTime": time,
            "observedGeneration": number,
        },
    }
    return {
        "type": "object",
        "description": "How the job is, as GetJob says.",
        "properties": {
            "conditions": {
                "type": "array",
                "items": condition,
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
            },
            "observedGeneration": number,
            "job": text,
            "state": text,
            "message": text,
            "step": number,
            "maxSteps": number,
            "policyVersion": number,
            "inferenceReplicas": number,
            "selector": text,
            "outputDir": text,
            "checkpoint": text,
            "startTime": time,
            "endTime": time,
            "metrics": {"type": "object", "additionalProperties": {"type": "number"}},
            "workers": {"type": "array", "items": {"type": "object", **ANYTHING}},
            "eventSequence": number,
        },
    }


def render() -> str:
    """The definition as YAML."""
    dumper = yaml.SafeDumper
    dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]
    return _HEAD + yaml.dump(definition(), Dumper=dumper, sort_keys=False, allow_unicode=True, width=118)


if __name__ == "__main__":
    sys.stdout.write(render())
