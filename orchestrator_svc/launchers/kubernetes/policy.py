"""What job authors may ask of the cluster, and what no pod of a job may have. Two gates: the `cluster` part when a job
is made, and the whole pod when it is about to be created, whatever it was put together from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from orchestrator_svc.launchers.kubernetes.api import Object
from surogate.config.cluster import ClusterConfig, PodConfig, Toleration, Volume
from surogate.errors import ConfigError, PermissionDeniedError, Violation

if TYPE_CHECKING:
    from orchestrator_svc.settings import OrchestratorSettings

SAFE_VOLUMES = frozenset(
    {"emptyDir", "configMap", "secret", "persistentVolumeClaim", "projected", "downwardAPI", "csi", "ephemeral"}
)
"""Kinds of volumes that the restricted Pod Security Standard allows. A Secret may come from a template only."""

_RESERVED = ("SUROGATE_", "LD_", "PYTHON", "KUBERNETES_", "GRPC_", "MASTER_", "NODE_RANK", "NUM_NODES", "NVIDIA_")
"""Beginnings of variables that job authors may not set: they would change what the operator's image does."""
_RESERVED_NAMES = frozenset({"PATH", "HOME", "IFS", "BASH_ENV", "ENV", "SSL_CERT_FILE", "SSL_CERT_DIR", "TMPDIR"})


_APPARMOR = "container.apparmor.security.beta.kubernetes.io/"
_SELINUX_TYPES = frozenset({"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"})
_API_SERVERS_OWN = "https://kubernetes.default.svc"
_API_SERVER = re.compile(r"^(https?://)?(kubernetes(\.default.*)?|api|apiserver)$")
"""Audiences by which an API server usually knows tokens that are for itself."""


def check_cluster(cluster: ClusterConfig, settings: OrchestratorSettings) -> None:
    """Raises ConfigError that names each key for which the operator has given no permission."""
    found = [*_violations(cluster, settings)]
    if found:
        raise ConfigError.of(found)


def check_image(image: str, key: str, settings: OrchestratorSettings) -> None:
    """Raises ConfigError if a job may not run an image."""
    found = [*_not_allowed(image, settings.allowed_images, key, "allowed_images")]
    if found:
        raise ConfigError.of(found)


def check_pod(pod: Object, what: str) -> None:
    """Raises PermissionDeniedError for a pod that could reach the host, other pods' identity, or root."""
    found = [*_annotation_dangers((pod.get("metadata") or {}).get("annotations") or {}), *_dangers(pod["spec"])]
    if found:
        text = "; ".join(found)
        raise PermissionDeniedError(f"the pod of {what} is refused: {text}", reason="POD_NOT_ALLOWED")


def _violations(cluster: ClusterConfig, settings: OrchestratorSettings) -> Iterator[Violation]:
    if cluster.queue:
        yield from _not_allowed(cluster.queue, settings.allowed_queues, "cluster.queue", "allowed_queues")
    if cluster.priority_class:
        allowed = settings.allowed_priority_classes
        yield from _not_allowed(cluster.priority_class, allowed, "cluster.priority_class", "allowed_priority_classes")
    yield from _placement(cluster.node_selector, cluster.tolerations, "cluster", settings)
    for name, pods in cluster.components():
        yield from _pod_violations(pods, f"cluster.{name}", settings)


def _pod_violations(pods: PodConfig, key: str, settings: OrchestratorSettings) -> Iterator[Violation]:
    if pods.image:
        yield from _not_allowed(pods.image, settings.allowed_images, f"{key}.image", "allowed_images")
    yield from _placement(pods.node_selector, pods.tolerations, key, settings)
    for part, amounts in (("requests", pods.resources.requests), ("limits", pods.resources.limits)):
        for resource in amounts:
            if "/" in resource and resource != settings.gpu_resource:
                where = f"{key}.resources.{part}.{resource}"
                yield from _not_allowed(resource, settings.allowed_resources, where, "allowed_resources")
    for i, secret in enumerate(pods.secrets):
        where = f"{key}.secrets.{i}"
        names = [secret.name, f"{secret.name}/{secret.key}"]
        if not any(_matches(name, settings.allowed_secrets) for name in names):
            yield from _not_allowed(names[1], [], where, "allowed_secrets")
        yield from _reserved(secret.env, f"{where}.env")
    for variable in pods.env:
        yield from _reserved(variable, f"{key}.env.{variable}")
    for i, volume in enumerate(pods.volumes):
        yield from _volume(volume, f"{key}.volumes.{i}", settings)


def _placement(
    node_selector: dict[str, str], tolerations: Sequence[Toleration], key: str, settings: OrchestratorSettings
) -> Iterator[Violation]:
    for label in node_selector:
        yield from _not_allowed(label, settings.allowed_node_labels, f"{key}.node_selector", "allowed_node_labels")
    for i, toleration in enumerate(tolerations):
        where = f"{key}.tolerations.{i}.key"
        yield from _not_allowed(toleration.key, settings.allowed_tolerations, where, "allowed_tolerations")


def _volume(volume: Volume, key: str, settings: OrchestratorSettings) -> Iterator[Violation]:
    roots = settings.allowed_mount_roots
    if not any(volume.mount_path == root or volume.mount_path.startswith(f"{root.rstrip('/')}/") for root in roots):
        yield Violation(f"{key}.mount_path", f"must be below {', '.join(roots)} (allowed_mount_roots)")
    if volume.pvc:
        yield from _not_allowed(volume.pvc, settings.allowed_claims, f"{key}.pvc", "allowed_claims")
    if volume.config_map:
        allowed = settings.allowed_config_maps
        yield from _not_allowed(volume.config_map, allowed, f"{key}.config_map", "allowed_config_maps")


def _reserved(variable: str, key: str) -> Iterator[Violation]:
    if variable.upper().startswith(_RESERVED) or variable.upper() in _RESERVED_NAMES:
        yield Violation(key, f"{variable} cannot be set: it would change what the image does")


def _not_allowed(value: str, allowed: Sequence[str], key: str, setting: str) -> Iterator[Violation]:
    if not _matches(value, allowed):
        yield Violation(key, f"{value!r} is not allowed on this cluster: the operator has not put it into {setting}")


def _matches(value: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(value, pattern) for pattern in patterns)


def _annotation_dangers(annotations: Object) -> Iterator[str]:
    for name, value in annotations.items():
        if name.startswith(_APPARMOR) and not str(value).startswith(("runtime/default", "localhost/")):
            yield f"the annotation {name} takes AppArmor away"


def _dangers(spec: Object) -> Iterator[str]:
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield f"{key} is set"
    if spec.get("hostUsers"):
        yield "hostUsers is true"
    if spec.get("nodeName"):
        yield "nodeName goes round the scheduler"
    if spec.get("automountServiceAccountToken"):
        yield "automountServiceAccountToken is true: a job's pods have no business with the API server"
    for volume in spec.get("volumes") or []:
        yield from _volume_dangers(volume)
    yield from _security(spec.get("securityContext") or {}, "the pod")
    inherits = (spec.get("securityContext") or {}).get("runAsNonRoot")
    for container in [
        *(spec.get("initContainers") or []),
        *spec["containers"],
        *(spec.get("ephemeralContainers") or []),
    ]:
        yield from _container_dangers(container, inherits)


def _volume_dangers(volume: Object) -> Iterator[str]:
    for kind in sorted(set(volume) - {"name"} - SAFE_VOLUMES):
        yield f"volume {volume.get('name')} is a {kind}"
    for source in (volume.get("projected") or {}).get("sources") or []:
        token = source.get("serviceAccountToken")
        if token is not None and _API_SERVER.search(token.get("audience") or _API_SERVERS_OWN):
            yield f"volume {volume.get('name')} holds a token for the API server"


def _container_dangers(container: Object, pod_is_non_root: Any) -> Iterator[str]:
    name, context = f"container {container.get('name')}", container.get("securityContext") or {}
    yield from _security(context, name)
    if context.get("runAsNonRoot", pod_is_non_root) is not True:
        yield f"{name} may run as root: runAsNonRoot must be true"
    if context.get("privileged"):
        yield f"{name} is privileged"
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{name} may gain privileges: allowPrivilegeEscalation must be false"
    if context.get("procMount", "Default") != "Default":
        yield f"{name} sees an unmasked /proc"
    capabilities = context.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        yield f"{name} keeps capabilities: drop ALL"
    for added in set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        yield f"{name} adds the capability {added}"
    if any(port.get("hostPort") for port in container.get("ports") or []):
        yield f"{name} takes a port of the host"
    if any(_elsewhere(container)):
        yield f"{name} has the node call other hosts: probes and hooks must name no host"


def _elsewhere(container: Object) -> Iterator[str]:
    """Hosts that the kubelet would call from its place in the network."""
    hooks = [*(container.get("lifecycle") or {}).values()]
    hooks += [container.get(f"{kind}Probe") or {} for kind in ("startup", "liveness", "readiness")]
    return ((hook.get(way) or {}).get("host") or "" for hook in hooks for way in ("httpGet", "tcpSocket"))


def _security(context: Object, what: str) -> Iterator[str]:
    if context.get("runAsUser") == 0:
        yield f"{what} runs as root (runAsUser: 0)"
    if context.get("sysctls"):
        yield f"{what} sets sysctls"
    if (context.get("seccompProfile") or {}).get("type") == "Unconfined":
        yield f"{what} runs without seccomp"
    if (context.get("appArmorProfile") or {}).get("type") == "Unconfined":
        yield f"{what} runs without AppArmor"
    selinux = context.get("seLinuxOptions") or {}
    if selinux.get("user") or selinux.get("role") or selinux.get("type", "container_t") not in _SELINUX_TYPES:
        yield f"{what} has an SELinux user, role or type that may reach the host"
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield f"{what} is a host process"
