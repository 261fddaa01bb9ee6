"""Pods: the restricted Pod Security Standard, probes, ends, what is mounted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.helpers.manifests.objects import Cluster, Object, Pod

_VOLUMES = frozenset(
    {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
)
_HANDLERS = frozenset({"grpc", "tcpSocket", "httpGet", "exec"})
_PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
_WRITTEN = ("/home/surogate", "/tmp", "/dev/shm")
"""Where the images write."""
_DRAIN = 30
"""Seconds of drain_seconds, the services' default."""


def pods_are_restricted(cluster: Cluster) -> Iterator[str]:
    """The restricted Pod Security Standard."""
    for pod in cluster.pods():
        yield from (f"{pod.where}: {text}" for text in _pod_dangers(pod))
        context = pod.spec.get("securityContext") or {}
        for container in pod.containers():
            own = container.get("securityContext") or {}
            for text in _container_dangers(container, {**context, **own}):
                yield f"{pod.where} {container['name']}: {text}"


def root_is_read_only(cluster: Cluster) -> Iterator[str]:
    """The root file system is read-only, and what the images write to is a mount."""
    for pod in cluster.pods():
        for container in pod.containers():
            if (container.get("securityContext") or {}).get("readOnlyRootFilesystem") is not True:
                yield f"{pod.where} {container['name']}: readOnlyRootFilesystem is not true"
            mounted = {mount["mountPath"] for mount in container.get("volumeMounts") or []}
            wanted = [path for path in _WRITTEN if container["name"] != "postgres" or path != "/home/surogate"]
            for path in wanted:
                if path not in mounted:
                    yield f"{pod.where} {container['name']}: nothing is mounted at {path}"


def user_is_the_images(cluster: Cluster) -> Iterator[str]:
    """The user is the one in the images' /etc/passwd, without which torch fails, and volumes are its group's."""
    for pod in cluster.pods():
        context = pod.spec.get("securityContext") or {}
        for key in ("runAsUser", "runAsGroup", "fsGroup"):
            if context.get(key) != 10001:
                yield f"{pod.where}: securityContext.{key} is {context.get(key)}, not 10001"


def service_links_are_off(cluster: Cluster) -> Iterator[str]:
    """Else a Service named vllm or surogate-reward sets variables that the programs read."""
    for pod in cluster.pods():
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.where}: enableServiceLinks is not false"


def mounts_have_volumes(cluster: Cluster) -> Iterator[str]:
    """Every mount names a volume, every volume is mounted, and no two mounts share a path."""
    for pod in cluster.pods():
        volumes = [volume["name"] for volume in pod.spec.get("volumes") or []]
        claimed = list(_claim_templates(cluster, pod))
        mounts = [mount for container in pod.containers() for mount in container.get("volumeMounts") or []]
        used = {mount["name"] for mount in mounts}
        for name in sorted(used - {*volumes, *claimed}):
            yield f"{pod.where}: mounts {name}, which is no volume"
        for name in sorted({*volumes} - used):
            yield f"{pod.where}: nobody mounts the volume {name}"
        if len(set(volumes)) != len(volumes):
            yield f"{pod.where}: two volumes have one name"
        for container in pod.containers():
            paths = [mount["mountPath"] for mount in container.get("volumeMounts") or []]
            if len(set(paths)) != len(paths):
                yield f"{pod.where} {container['name']}: two mounts have one path"


def probes_have_one_handler(cluster: Cluster) -> Iterator[str]:
    """A probe asks in one way, and a container's hook acts in one way."""
    for pod in cluster.pods():
        for container in pod.containers():
            where = f"{pod.where} {container['name']}"
            for name in _PROBES:
                found = _HANDLERS & (container.get(name) or {}).keys()
                if name in container and len(found) != 1:
                    yield f"{where} {name}: {sorted(found) or 'no'} handlers; there must be one"
            hook = (container.get("lifecycle") or {}).get("preStop")
            if hook is not None and len(hook) != 1:
                yield f"{where} preStop: {sorted(hook)} handlers; there must be one"


def probes_are_there(cluster: Cluster) -> Iterator[str]:
    """Startup, liveness and readiness; gRPC ones ask a port that the container has, and liveness does not ask for
    readiness."""
    for pod in cluster.pods():
        for container in pod.service_containers():
            where = f"{pod.where} {container['name']}"
            ports = {value for port in container.get("ports") or [] for value in (port["name"], port["containerPort"])}
            for name in _PROBES:
                if name not in container:
                    yield f"{where}: no {name}"
            for name in _PROBES:
                probe = container.get(name) or {}
                port = (probe.get("grpc") or probe.get("tcpSocket") or {}).get("port")
                if port is not None and port not in ports:
                    yield f"{where} {name}: the container has no port {port}"
            asked = [(container.get(name) or {}).get("grpc", {}).get("service") for name in _PROBES[1:]]
            if asked[0] is not None and asked[0] == asked[1]:
                yield f"{where}: a container that is not ready would be killed: liveness asks what readiness asks"


def there_is_time_to_end(cluster: Cluster) -> Iterator[str]:
    """Before SIGTERM clients have time to turn away, and after it calls have time to finish, before SIGKILL."""
    for pod in cluster.pods():
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        for container in pod.service_containers():
            hook = (container.get("lifecycle") or {}).get("preStop")
            if hook is None:
                yield f"{pod.where} {container['name']}: no preStop"
                continue
            waits = (hook.get("sleep") or {}).get("seconds", 0)
            if grace <= waits + _DRAIN:
                yield f"{pod.where}: {grace} s of grace are not more than preStop {waits} s and drain {_DRAIN} s"


def images_are_pinned(cluster: Cluster) -> Iterator[str]:
    """Every image has a tag other than latest, or a digest."""
    for pod in cluster.pods():
        for container in pod.containers():
            image = container.get("image", "")
            _, at, digest = image.partition("@sha256:")
            tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
            if not (at and digest) and tag in {"", "latest"}:
                yield f"{pod.where} {container['name']}: the image {image!r} may be another tomorrow"


RULES = (
    pods_are_restricted,
    root_is_read_only,
    user_is_the_images,
    service_links_are_off,
    mounts_have_volumes,
    probes_have_one_handler,
    probes_are_there,
    there_is_time_to_end,
    images_are_pinned,
)


def _claim_templates(cluster: Cluster, pod: Pod) -> Iterator[str]:
    kind, _, name = pod.where.partition("/")
    owner = cluster.find(kind, name) if kind == "StatefulSet" else None
    for claim in ((owner or {}).get("spec") or {}).get("volumeClaimTemplates") or []:
        yield claim["metadata"]["name"]


def _pod_dangers(pod: Pod) -> Iterator[str]:
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(key):
            yield f"{key} is set"
    for volume in pod.spec.get("volumes") or []:
        for kind in sorted(volume.keys() - {"name"} - _VOLUMES):
            yield f"the volume {volume['name']} is a {kind}"
    if (pod.spec.get("securityContext") or {}).get("sysctls"):
        yield "it sets sysctls"


def _container_dangers(container: Object, context: dict[str, Any]) -> Iterator[str]:
    if context.get("privileged"):
        yield "privileged"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if context.get("runAsNonRoot") is not True:
        yield "runAsNonRoot is not true"
    if context.get("runAsUser") == 0:
        yield "runAsUser is 0"
    if (context.get("seccompProfile") or {}).get("type") not in {"RuntimeDefault", "Localhost"}:
        yield "no seccompProfile"
    capabilities = context.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        yield "capabilities are not dropped"
    if set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        yield "capabilities are added"
    if context.get("procMount", "Default") != "Default":
        yield "procMount is not the default"
    if any(port.get("hostPort") for port in container.get("ports") or []):
        yield "hostPort is set"
