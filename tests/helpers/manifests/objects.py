"""Manifests as Python objects: what is in a rendered overlay, and its pods, wherever they hide."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import yaml

Object: TypeAlias = dict[str, Any]

CLUSTER_KINDS = frozenset({"Namespace", "PriorityClass", "ClusterQueue", "ResourceFlavor", "CustomResourceDefinition"})
"""Kinds that are in no namespace."""

TEMPLATES = "surogate-pod-templates"
"""Beginning of the name of the ConfigMap that holds the launcher's pod templates."""


@dataclass(frozen=True)
class Pod:
    """A pod, or the template of one."""

    where: str
    labels: Mapping[str, str]
    spec: Object

    def containers(self) -> Iterator[Object]:
        """Its containers, those that run first included."""
        yield from self.spec.get("initContainers") or []
        yield from self.spec["containers"]

    def service_containers(self) -> list[Object]:
        """Those that serve."""
        found: list[Object] = self.spec["containers"]
        return found


@dataclass(frozen=True)
class Cluster:
    """What is applied together."""

    objects: list[Object]
    given: frozenset[str] = field(default_factory=frozenset)
    """`Kind/name` of what somebody else makes: Secrets, by the instructions."""

    def of(self, *kinds: str) -> Iterator[Object]:
        """Objects of these kinds."""
        return (one for one in self.objects if one.get("kind") in kinds)

    def find(self, kind: str, name: str) -> Object | None:
        """An object by its name."""
        return next((one for one in self.of(kind) if one["metadata"]["name"] == name), None)

    def has(self, kind: str, name: str) -> bool:
        """Whether there is such an object, here or made by somebody else."""
        return self.find(kind, name) is not None or f"{kind}/{name}" in self.given

    def pods(self) -> Iterator[Pod]:
        """All pods and templates of pods."""
        for one in self.objects:
            yield from pods_of(one)


Rule: TypeAlias = Callable[[Cluster], Iterator[str]]
"""Yields what it has against a cluster, each with the object that it is about."""


def name_of(one: Object) -> str:
    """`Kind/name`, for people."""
    return f"{one.get('kind')}/{(one.get('metadata') or {}).get('name')}"


def pods_of(one: Object) -> Iterator[Pod]:
    """The pods that an object makes, or describes."""
    kind, spec = one.get("kind"), one.get("spec") or {}
    if kind == "Pod":
        yield _pod(name_of(one), one)
    elif kind in {"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"}:
        yield _pod(name_of(one), spec["template"])
    elif kind == "CronJob":
        yield _pod(name_of(one), spec["jobTemplate"]["spec"]["template"])
    elif kind == "ConfigMap" and one["metadata"]["name"].startswith(TEMPLATES):
        for file, text in one["data"].items():
            yield _pod(f"{name_of(one)}/{file}", parse(text), {"app.kubernetes.io/managed-by": MANAGER})


@cache
def parse(text: str) -> Any:
    """What YAML says, to be read and not changed."""
    return yaml.load(text, yaml.CSafeLoader)


MANAGER = "surogate-orchestrator"
"""Who makes pods from the templates: the launcher puts it on their labels."""


def _pod(where: str, template: Object, more: Mapping[str, str] | None = None) -> Pod:
    labels = (template.get("metadata") or {}).get("labels") or {}
    return Pod(where, {**labels, **(more or {})}, template["spec"])


def load(text: str, given: frozenset[str] = frozenset()) -> Cluster:
    """The objects of a file of manifests."""
    return Cluster([one for one in yaml.load_all(text, yaml.CSafeLoader) if one], given)


def render(folder: Path) -> str:
    """`kubectl kustomize FOLDER`. Raises AssertionError with what it says."""
    command = ["kubectl", "kustomize", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector (matchLabels, matchExpressions) selects what has these labels."""
    wanted = selector.get("matchLabels") or {}
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    return all(_holds(expression, labels) for expression in selector.get("matchExpressions") or [])


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values") or []
    operator = expression["operator"]
    if operator == "In":
        return value in values
    if operator == "NotIn":
        return value not in values
    return (value is not None) == (operator == "Exists")
