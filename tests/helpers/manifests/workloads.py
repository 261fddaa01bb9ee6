"""Workloads and what stands around them: selectors, Services, restarts, scaling, disruption, names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from tests.helpers.manifests.objects import CLUSTER_KINDS, TEMPLATES, Cluster, Object, name_of, pods_of, selects

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_SERVICE = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_PORT = re.compile(r"(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_COLON_NAMES = frozenset({"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"})
_OWNERS = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet")


def selectors_match_their_templates(cluster: Cluster) -> Iterator[str]:
    """A workload's selector selects the pods of its own template."""
    for one in cluster.of(*_OWNERS):
        for pod in pods_of(one):
            selector = one["spec"]["selector"]
            if not selector.get("matchLabels") and not selector.get("matchExpressions"):
                yield f"{name_of(one)}: its selector is empty"
            elif not selects(selector, pod.labels):
                yield f"{name_of(one)}: its selector does not select its own pods"


def services_select_one_kind_of_pods(cluster: Cluster) -> Iterator[str]:
    """A Service leads to the pods of one owner, and to a port that they have."""
    for one in cluster.of("Service"):
        selector = one["spec"].get("selector")
        if not selector:
            yield f"{name_of(one)}: it has no selector"
            continue
        found = [pod for pod in cluster.pods() if selects({"matchLabels": selector}, pod.labels)]
        if len(found) != 1:
            yield f"{name_of(one)}: it selects {[pod.where for pod in found] or 'nothing'}, not the pods of one owner"
        for pod in found:
            ports = [port for container in pod.containers() for port in container.get("ports") or []]
            known = {value for port in ports for value in (port.get("name"), port["containerPort"])}
            for port in one["spec"]["ports"]:
                if port.get("targetPort", port["port"]) not in known:
                    yield f"{name_of(one)}: {pod.where} has no port {port.get('targetPort', port['port'])}"


def restarts_are_possible(cluster: Cluster) -> Iterator[str]:
    """Jobs restart Never or OnFailure, everything else Always."""
    for one in cluster.of("Job", "CronJob", *_OWNERS):
        for pod in pods_of(one):
            policy = pod.spec.get("restartPolicy", "Always")
            if (policy == "Always") == (one["kind"] in {"Job", "CronJob"}):
                yield f"{name_of(one)}: restartPolicy {policy}"


def scaling_is_bounded(cluster: Cluster) -> Iterator[str]:
    """The most replicas are not fewer than the least, and what is scaled is there and leaves its number open."""
    for one in cluster.of("HorizontalPodAutoscaler", "ScaledObject"):
        spec = one["spec"]
        least = spec.get("minReplicas", spec.get("minReplicaCount", 1))
        most = spec.get("maxReplicas", spec.get("maxReplicaCount", 100))
        if most < max(least, 1):
            yield f"{name_of(one)}: at most {most} replicas, at least {least}"
        target = spec["scaleTargetRef"]
        scaled = cluster.find(target.get("kind", "Deployment"), target["name"])
        if scaled is None:
            yield f"{name_of(one)}: there is no {target.get('kind', 'Deployment')}/{target['name']}"
        elif "replicas" in scaled["spec"]:
            yield f"{name_of(one)}: {name_of(scaled)} sets replicas too, and would undo it whenever it is applied"


def budgets_have_one_bound(cluster: Cluster) -> Iterator[str]:
    """A disruption budget has one bound, selects something, and can be computed: maxUnavailable and percentages need an
    owner that can be scaled, which the pods of Jobs have not."""
    for one in cluster.of("PodDisruptionBudget"):
        spec = one["spec"]
        bounds = {"minAvailable", "maxUnavailable"} & spec.keys()
        if len(bounds) != 1:
            yield f"{name_of(one)}: {sorted(bounds) or 'no'} bounds; there must be one"
        selector = spec.get("selector") or {}
        found = [pod for pod in cluster.pods() if selects(selector, pod.labels)]
        if not found or not selector:
            yield f"{name_of(one)}: it selects nothing, or everything"
        from_templates = any(TEMPLATES in pod.where for pod in found)
        if from_templates and not isinstance(spec.get("minAvailable"), int):
            yield f"{name_of(one)}: its pods have no scalable owner; only a number in minAvailable works"


def names_are_legal(cluster: Cluster) -> Iterator[str]:
    """Names that DNS allows, of objects, containers, ports and volumes; legal labels."""
    for one in cluster.objects:
        name = str(one["metadata"]["name"])
        form = _SERVICE if one["kind"] == "Service" else _SUBDOMAIN
        if not form.fullmatch(name) and one["kind"] not in _COLON_NAMES:
            yield f"{name_of(one)}: the name is not legal"
        for key, value in (one["metadata"].get("labels") or {}).items():
            if not isinstance(value, str) or not _LABEL_VALUE.fullmatch(value):
                yield f"{name_of(one)}: the label {key} has the value {value!r}"
    for pod in cluster.pods():
        named = [*pod.containers(), *(pod.spec.get("volumes") or [])]
        yield from (f"{pod.where}: {x['name']!r} is no name" for x in named if not _LABEL.fullmatch(str(x["name"])))
        ports = [port for container in pod.containers() for port in container.get("ports") or []]
        for port in ports:
            if "name" in port and not _PORT.fullmatch(str(port["name"])):
                yield f"{pod.where}: the port {port['name']!r} has no legal name"
        names = [port["name"] for port in ports if "name" in port]
        if len(set(names)) != len(names):
            yield f"{pod.where}: two ports have one name"


def objects_are_there_once(cluster: Cluster) -> Iterator[str]:
    """No object twice; those of a namespace are in the one that is made."""
    counted = Counter((one["apiVersion"], name_of(one)) for one in cluster.objects)
    yield from (f"{name}: it is there {count} times" for (_, name), count in counted.items() if count > 1)
    spaces = {one["metadata"]["name"] for one in cluster.of("Namespace")}
    for one in cluster.objects:
        space = one["metadata"].get("namespace")
        if one["kind"] in CLUSTER_KINDS:
            if space is not None:
                yield f"{name_of(one)}: it is of no namespace, and names {space}"
        elif space not in spaces:
            yield f"{name_of(one)}: its namespace {space} is not made"


def volumes_have_one_writer(cluster: Cluster) -> Iterator[str]:
    """A Deployment on a volume that one node can mount has one pod at a time."""
    for one in cluster.of("Deployment"):
        for pod in pods_of(one):
            for claim in _claims(cluster, pod.spec):
                if "ReadWriteMany" in claim["spec"]["accessModes"]:
                    yield f"{name_of(claim)}: ReadWriteMany, which most clusters do not have"
                replicas, strategy = one["spec"].get("replicas", 1), one["spec"].get("strategy") or {}
                if replicas != 1 or strategy.get("type") != "Recreate":
                    yield f"{name_of(one)}: {replicas} pods, {strategy.get('type')}, on the volume {name_of(claim)}"


RULES = (
    selectors_match_their_templates,
    services_select_one_kind_of_pods,
    restarts_are_possible,
    scaling_is_bounded,
    budgets_have_one_bound,
    names_are_legal,
    objects_are_there_once,
    volumes_have_one_writer,
)


def _claims(cluster: Cluster, spec: Object) -> Iterator[Object]:
    for volume in spec.get("volumes") or []:
        if "persistentVolumeClaim" in volume:
            found = cluster.find("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
            if found is not None:
                yield found
