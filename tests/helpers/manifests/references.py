"""References: everything that is named is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.helpers.manifests.objects import Cluster, Object, Pod, name_of

_SYSTEM_CLASSES = frozenset({"system-cluster-critical", "system-node-critical"})


def references_of_pods_lead_somewhere(cluster: Cluster) -> Iterator[str]:
    """ConfigMaps, Secrets, claims, accounts and classes that a pod names are there, unless they are optional."""
    for pod in cluster.pods():
        for kind, name in _named(pod):
            if not _there(cluster, kind, name):
                yield f"{pod.where}: there is no {kind}/{name}"


def references_of_others_lead_somewhere(cluster: Cluster) -> Iterator[str]:
    """Services, roles, queues and issuers that other objects name are there."""
    for one in cluster.objects:
        for kind, name in _named_by(one):
            if not cluster.has(kind, name):
                yield f"{name_of(one)}: there is no {kind}/{name}"


def keys_are_there(cluster: Cluster) -> Iterator[str]:
    """A key that is read from a ConfigMap is in it."""
    for pod in cluster.pods():
        for container in pod.containers():
            for variable in container.get("env") or []:
                source = (variable.get("valueFrom") or {}).get("configMapKeyRef")
                found = source and cluster.find("ConfigMap", source["name"])
                if found and source["key"] not in found.get("data", {}) and not source.get("optional"):
                    yield f"{pod.where} {container['name']}: ConfigMap/{source['name']} has no {source['key']}"


def variables_are_set_once(cluster: Cluster) -> Iterator[str]:
    """Of two variables of one name the first would count for nothing."""
    for pod in cluster.pods():
        for container in pod.containers():
            names = [variable["name"] for variable in container.get("env") or []]
            for name in sorted({name for name in names if names.count(name) > 1}):
                yield f"{pod.where} {container['name']}: {name} is set twice"


RULES = (references_of_pods_lead_somewhere, references_of_others_lead_somewhere, keys_are_there, variables_are_set_once)


def _there(cluster: Cluster, kind: str, name: str) -> bool:
    if kind == "Secret":
        made = {one["spec"]["secretName"] for one in cluster.of("Certificate")}
        return name in made or cluster.has(kind, name)
    return cluster.has(kind, name) or (kind == "PriorityClass" and name in _SYSTEM_CLASSES)


def _named_by(one: Object) -> Iterator[tuple[str, str]]:
    spec = one.get("spec") or {}
    if one["kind"] == "StatefulSet":
        yield "Service", spec["serviceName"]
    elif one["kind"] == "RoleBinding":
        yield from ((target["kind"], target["name"]) for target in (one["roleRef"], *one["subjects"]))
    elif one["kind"] == "LocalQueue":
        yield "ClusterQueue", spec["clusterQueue"]
    elif one["kind"] == "Certificate":
        yield spec["issuerRef"].get("kind", "Issuer"), spec["issuerRef"]["name"]


def _named(pod: Pod) -> Iterator[tuple[str, str]]:
    yield "ServiceAccount", pod.spec.get("serviceAccountName", "default")
    if "priorityClassName" in pod.spec:
        yield "PriorityClass", pod.spec["priorityClassName"]
    for volume in pod.spec.get("volumes") or []:
        yield from _of_volume(volume)
    for container in pod.containers():
        for source in container.get("envFrom") or []:
            yield from _required("ConfigMap", source.get("configMapRef"), "name")
            yield from _required("Secret", source.get("secretRef"), "name")
        for variable in container.get("env") or []:
            source = variable.get("valueFrom") or {}
            yield from _required("ConfigMap", source.get("configMapKeyRef"), "name")
            yield from _required("Secret", source.get("secretKeyRef"), "name")


def _of_volume(volume: Object) -> Iterator[tuple[str, str]]:
    yield from _required("ConfigMap", volume.get("configMap"), "name")
    yield from _required("Secret", volume.get("secret"), "secretName")
    yield from _required("PersistentVolumeClaim", volume.get("persistentVolumeClaim"), "claimName")


def _required(kind: str, reference: dict[str, Any] | None, key: str) -> Iterator[tuple[str, str]]:
    if reference and not reference.get("optional"):
        yield kind, reference[key]
