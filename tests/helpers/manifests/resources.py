"""Resources: quantities, GPUs, memory for /dev/shm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.helpers.manifests.objects import Cluster, Object, Pod, name_of
from tests.helpers.manifests.quantities import parse


def quantities_are_legal(cluster: Cluster) -> Iterator[str]:
    """Every quantity can be read, and is not below zero."""
    for where, value in _quantities(cluster):
        try:
            if parse(value) < 0:
                yield f"{where}: {value} is below zero"
        except ValueError as error:
            yield f"{where}: {error}"


def requests_are_within_limits(cluster: Cluster) -> Iterator[str]:
    """A request above its limit is refused."""
    for where, container in _containers(cluster):
        requests, limits = _parts(container)
        for name in requests.keys() & limits.keys():
            if _number(requests[name]) > _number(limits[name]):
                yield f"{where}: requests {requests[name]} of {name}, and is limited to {limits[name]}"


def gpus_are_requested_as_limited(cluster: Cluster) -> Iterator[str]:
    """Extended resources cannot be overcommitted: request and limit are the same."""
    for where, container in _containers(cluster):
        requests, limits = _parts(container)
        for name in sorted(_extended(requests) | _extended(limits)):
            if name not in limits or _number(requests.get(name, limits[name])) != _number(limits[name]):
                yield f"{where}: requests {requests.get(name)} of {name}, and is limited to {limits.get(name)}"


def gpus_are_whole(cluster: Cluster) -> Iterator[str]:
    """There are no fractions of an extended resource."""
    for where, container in _containers(cluster):
        for part in _parts(container):
            for name in sorted(_extended(part)):
                if _number(part[name]).denominator != 1:
                    yield f"{where}: {part[name]} of {name} is not a whole number"


def resources_are_bounded(cluster: Cluster) -> Iterator[str]:
    """Every container says what it needs and what it may use, of processor, memory and disk."""
    for where, container in _containers(cluster):
        for part, amounts in zip(("requests", "limits"), _parts(container), strict=True):
            for name in ("cpu", "memory", "ephemeral-storage"):
                if name not in amounts:
                    yield f"{where}: no {part}.{name}"


def shared_memory_is_sized(cluster: Cluster) -> Iterator[str]:
    """/dev/shm is memory of a stated size, within what the container may use."""
    for pod in cluster.pods():
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes") or []}
        for container in pod.service_containers():
            where = f"{pod.where} {container['name']}"
            mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts") or []}
            empty = (volumes.get(mounts.get("/dev/shm", "")) or {}).get("emptyDir") or {}
            if empty.get("medium") != "Memory" or not empty.get("sizeLimit"):
                yield f"{where}: /dev/shm is no emptyDir in memory with a sizeLimit"
            elif _number(empty["sizeLimit"]) >= _number(_parts(container)[1].get("memory", 0)):
                yield f"{where}: /dev/shm may take all the memory of the container"


def disks_fit_their_limit(cluster: Cluster) -> Iterator[str]:
    """A pod whose folders may hold more than its ephemeral storage is evicted before they are full."""
    for pod in cluster.pods():
        folders = [volume.get("emptyDir") for volume in pod.spec.get("volumes") or []]
        sizes = [one["sizeLimit"] for one in folders if one and one.get("sizeLimit") and one.get("medium") != "Memory"]
        limits = [_parts(container)[1].get("ephemeral-storage", 0) for container in pod.service_containers()]
        if limits and max(map(_number, sizes), default=_number(0)) > sum(map(_number, limits)):
            yield f"{pod.where}: a folder of {', '.join(map(str, sizes))} is larger than the limit of {limits}"


RULES = (
    quantities_are_legal,
    requests_are_within_limits,
    gpus_are_requested_as_limited,
    gpus_are_whole,
    resources_are_bounded,
    shared_memory_is_sized,
    disks_fit_their_limit,
)


def _containers(cluster: Cluster) -> Iterator[tuple[str, Object]]:
    for pod in cluster.pods():
        for container in pod.containers():
            yield f"{pod.where} {container['name']}", container


def _parts(container: Object) -> tuple[dict[str, Any], dict[str, Any]]:
    found = container.get("resources") or {}
    return found.get("requests") or {}, found.get("limits") or {}


def _extended(amounts: dict[str, Any]) -> set[str]:
    return {name for name in amounts if "/" in name and not name.startswith("kubernetes.io/")}


def _number(value: Any) -> Any:
    """The number, or 0 for what `quantities_are_legal` complains about."""
    try:
        return parse(value)
    except ValueError:
        return parse(0)


def _quantities(cluster: Cluster) -> Iterator[tuple[str, Any]]:
    for where, container in _containers(cluster):
        for part in _parts(container):
            yield from ((f"{where} {name}", value) for name, value in part.items())
    for pod in cluster.pods():
        yield from _sizes(pod)
    for one in cluster.of("PersistentVolumeClaim"):
        yield name_of(one), one["spec"]["resources"]["requests"]["storage"]
    for one in cluster.of("StatefulSet"):
        for claim in one["spec"].get("volumeClaimTemplates") or []:
            yield name_of(one), claim["spec"]["resources"]["requests"]["storage"]


def _sizes(pod: Pod) -> Iterator[tuple[str, Any]]:
    for volume in pod.spec.get("volumes") or []:
        if "sizeLimit" in (volume.get("emptyDir") or {}):
            yield f"{pod.where} {volume['name']}", volume["emptyDir"]["sizeLimit"]
