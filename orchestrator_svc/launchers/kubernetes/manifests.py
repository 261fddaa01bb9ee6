"""The Kubernetes objects of a job: from a template, the job's configuration and what the services need to meet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator_svc.launchers.base import Component, WorkerSpec
from orchestrator_svc.launchers.kubernetes import names
from orchestrator_svc.launchers.kubernetes.api import Object
from surogate.config.cluster import ClusterConfig, PodConfig, Toleration, Volume

if TYPE_CHECKING:
    from orchestrator_svc.settings import OrchestratorSettings
    from surogate.config.job import AnyJob

GRPC_PORT, METRICS_PORT, RENDEZVOUS_PORT = 50051, 9090, 29500
CONFIG_VOLUME, CONFIG_FOLDER = "surogate-config", "/etc/surogate/worker"
CONFIG_FILE = "config.json"
_KEEP_FINISHED = 86_400
"""Seconds after which the cluster itself removes a finished Job, if the orchestrator never comes back for it."""
_CONTAINER_DEFAULTS = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
_POD_DEFAULTS = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


@dataclass(frozen=True)
class Owner:
    """The object that the others of a job belong to: deleted with it."""

    kind: str
    version: str
    name: str
    uid: str

    def reference(self) -> Object:
        """As `metadata.ownerReferences` has it."""
        return {"apiVersion": self.version, "kind": self.kind, "name": self.name, "uid": self.uid}


class Manifests:
    """Makes the objects of one job."""

    def __init__(self, job_id: str, run: str, config: AnyJob, settings: OrchestratorSettings) -> None:
        """`run` tells this job from an earlier one of the same id."""
        self.job_id = job_id
        self.run = run
        self._config = config
        self._settings = settings
        self._cluster = config.cluster or ClusterConfig()
        self.labels = names.job_labels(settings.instance, job_id)

    def anchor(self, owner: Owner | None) -> Object:
        """The ConfigMap that owns everything else of the job."""
        body = self._object("v1", "ConfigMap", names.stem(self.job_id), self.labels, owner)
        body["metadata"]["annotations"] = {names.RUN: self.run}
        return {**body, "data": {"job": f"jobs/{self.job_id}", "kind": self._config.kind}}

    def service(self, component: Component, owner: Owner) -> Object:
        """The headless Service of a component: every pod under a name of its own, before it is ready too, since the
        ranks of a trainer meet, and replicas get their weights, before they are."""
        labels = {**self.labels, names.COMPONENT: component}
        name = names.service_name(self.job_id, component)
        spec = {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {names.JOB: self.job_id, names.COMPONENT: component, names.INSTANCE: self._settings.instance},
            "ports": [
                {"name": "grpc", "port": GRPC_PORT, "targetPort": GRPC_PORT, "appProtocol": "kubernetes.io/h2c"},
                {"name": "metrics", "port": METRICS_PORT, "targetPort": METRICS_PORT},
            ],
        }
        return {**self._object("v1", "Service", name, labels, owner), "spec": spec}

    def worker_config(self, spec: WorkerSpec, owner: Owner) -> Object:
        """The ConfigMap with the configuration of a component's service."""
        labels = {**self.labels, names.COMPONENT: spec.component}
        body = self._object("v1", "ConfigMap", names.service_name(self.job_id, spec.component), labels, owner)
        return {**body, "data": {CONFIG_FILE: json.dumps(spec.config, indent=2)}}

    def worker(self, spec: WorkerSpec, incarnation: int, template: Object, owner: Owner) -> Object:
        """The Job of one incarnation of a worker. It runs its pods once; what comes after is the launcher's to say."""
        name = names.worker_name(self.job_id, spec.component, spec.index, incarnation)
        labels = {
            **self.labels,
            names.COMPONENT: spec.component,
            names.INDEX: str(spec.index),
            names.INCARNATION: str(incarnation),
        }
        nodes = self.nodes(spec.component)
        body = self._object("batch/v1", "Job", name, labels, owner)
        body["spec"] = {
            "backoffLimit": 0,
            "completions": nodes,
            "parallelism": nodes,
            "completionMode": "Indexed",
            "ttlSecondsAfterFinished": _KEEP_FINISHED,
            # A pod that the cluster moves is replaced, when it is gone; that is no fault of the worker's.
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "podReplacementPolicy": "Failed",
            "template": self._pod(spec, name, nodes, labels, template),
        }
        if self._cluster.max_runtime:
            body["spec"]["activeDeadlineSeconds"] = self._cluster.max_runtime
        if self._cluster.queue:
            body["metadata"]["labels"] = {**labels, names.QUEUE: self._cluster.queue}
            body["spec"]["suspend"] = True
        return body

    def nodes(self, component: Component) -> int:
        """Pods of one worker: a trainer has one a node."""
        return self._config.train.distributed.num_nodes if component == "trainer" else 1

    def host(self, job_name: str, component: Component, node: int = 0) -> str:
        """DNS name of a worker's pod within the cluster."""
        service = names.service_name(self.job_id, component)
        return f"{job_name}-{node}.{service}.{self._settings.namespace}.svc"

    def _object(self, version: str, kind: str, name: str, labels: Mapping[str, str], owner: Owner | None) -> Object:
        metadata: Object = {"name": name, "labels": dict(labels)}
        if owner is not None:
            metadata["ownerReferences"] = [owner.reference()]
        return {"apiVersion": version, "kind": kind, "metadata": metadata}

    def _pod(self, spec: WorkerSpec, name: str, nodes: int, labels: Mapping[str, str], template: Object) -> Object:
        pod = deepcopy(template)
        metadata = pod.setdefault("metadata", {})
        metadata["labels"] = {**(metadata.get("labels") or {}), **labels}
        main = {names.MAIN_CONTAINER: pod["spec"]["containers"][0]["name"]}
        metadata["annotations"] = {**(metadata.get("annotations") or {}), **main}
        pods = self._cluster.pods(spec.component)
        body = pod["spec"]
        body["restartPolicy"] = "Never"
        body["subdomain"] = names.service_name(self.job_id, spec.component)
        body.setdefault("enableServiceLinks", False)
        body.setdefault("automountServiceAccountToken", False)
        body["securityContext"] = {**_POD_DEFAULTS, **(body.get("securityContext") or {})}
        for container in [*(body.get("initContainers") or []), *body["containers"]]:
            container["securityContext"] = {**_CONTAINER_DEFAULTS, **(container.get("securityContext") or {})}
        self._place(body, pods)
        self._equip(body, pods, spec)
        worker = body["containers"][0]
        worker["env"] = _with_env(worker.get("env") or [], self._environment(spec, name, nodes), pods)
        if spec.config is not None:
            source = {"name": CONFIG_VOLUME, "configMap": {"name": names.service_name(self.job_id, spec.component)}}
            mount = {"name": CONFIG_VOLUME, "mountPath": CONFIG_FOLDER, "readOnly": True}
            _mount(body, source, mount)
        return pod

    def _place(self, body: Object, pods: PodConfig) -> None:
        """Where the pod may run."""
        selector = {**(body.get("nodeSelector") or {}), **self._cluster.node_selector, **pods.node_selector}
        if selector:
            body["nodeSelector"] = selector
        tolerations = [_toleration(item) for item in [*self._cluster.tolerations, *pods.tolerations]]
        if tolerations:
            body["tolerations"] = [*(body.get("tolerations") or []), *tolerations]
        if self._cluster.priority_class:
            body["priorityClassName"] = self._cluster.priority_class

    def _equip(self, body: Object, pods: PodConfig, spec: WorkerSpec) -> None:
        """The worker's image, resources and volumes."""
        worker = body["containers"][0]
        if spec.image or pods.image:
            worker["image"] = spec.image or pods.image
        if spec.image:
            _make_foreign(body, worker)
        resources = _strings(worker.get("resources") or {})
        for part in ("requests", "limits"):
            given = getattr(pods.resources, part)
            if given:
                resources[part] = {**resources.get(part, {}), **given}
        gpus = self._gpus(spec, pods, resources)
        if gpus is not None:
            _set_gpus(resources, self._settings.gpu_resource, gpus)
        _let_requests_fit(resources, pods)
        if resources:
            worker["resources"] = resources
        for i, volume in enumerate(pods.volumes):
            _mount(body, _volume_source(f"job-{i}", volume), _volume_mount(f"job-{i}", volume))

    def _gpus(self, spec: WorkerSpec, pods: PodConfig, resources: Object) -> int | None:
        """GPUs of a pod; None leaves the template's."""
        if pods.gpus is not None:
            return pods.gpus
        if self._settings.gpu_resource not in resources.get("limits", {}):
            return None
        config = self._config
        if spec.component == "trainer":
            return config.train.distributed.gpus_per_node or config.train.gpus or None
        if spec.component == "inference" and config.kind == "grpo":
            return config.infer.tp
        return None

    def _environment(self, spec: WorkerSpec, name: str, nodes: int) -> Mapping[str, Any]:
        """Variables that the service must have to be found and to find the others."""
        prefix = f"SUROGATE_{spec.component.upper()}_"
        found: dict[str, Any] = {
            f"{prefix}LISTEN": f"0.0.0.0:{GRPC_PORT}",
            f"{prefix}METRICS_LISTEN": f"0.0.0.0:{METRICS_PORT}",
        }
        if spec.config is not None:
            found[f"{prefix}CONFIG"] = f"{CONFIG_FOLDER}/{CONFIG_FILE}"
        if spec.component == "inference":
            found[f"{prefix}AWAIT_WEIGHTS"] = "true"
        if nodes > 1:
            rank = {"fieldRef": {"fieldPath": f"metadata.annotations['{names.COMPLETION_INDEX}']"}}
            found |= {
                "MASTER_ADDR": self.host(name, spec.component),
                "MASTER_PORT": str(RENDEZVOUS_PORT),
                "NUM_NODES": str(nodes),
                "NODE_RANK": rank,
            }
            if self._config.train.distributed.gpus_per_node or self._config.train.gpus:
                found["GPUS_PER_NODE"] = str(self._config.train.distributed.gpus_per_node or self._config.train.gpus)
        return found


def _with_env(template: list[Object], own: Mapping[str, Any], pods: PodConfig) -> list[Object]:
    """The template's variables and those of the services; a job's own only where neither has one of that name."""
    found = {item["name"]: item for item in template}
    for name, value in own.items():
        if name not in found or not name.endswith("LISTEN"):
            found[name] = {"name": name, **({"value": value} if isinstance(value, str) else {"valueFrom": value})}
    for name, value in pods.env.items():
        found.setdefault(name, {"name": name, "value": value})
    for secret in pods.secrets:
        source = {"secretKeyRef": {"name": secret.name, "key": secret.key}}
        found.setdefault(secret.env, {"name": secret.env, "valueFrom": source})
    return list(found.values())


def _make_foreign(body: Object, worker: Object) -> None:
    """Fits the template to an image of the author's own: its own command, no secrets of the operator's, and a probe
    that any gRPC server passes."""
    for key in ("command", "args", "envFrom", "lifecycle", "startupProbe", "livenessProbe"):
        worker.pop(key, None)
    worker["env"] = [item for item in worker.get("env") or [] if "valueFrom" not in item]
    worker["readinessProbe"] = {"tcpSocket": {"port": GRPC_PORT}, "periodSeconds": 5}
    secret = {item["name"] for item in body.get("volumes") or [] if not {"emptyDir", "configMap"} & set(item)}
    body["volumes"] = [item for item in body.get("volumes") or [] if item["name"] not in secret]
    worker["volumeMounts"] = [item for item in worker.get("volumeMounts") or [] if item["name"] not in secret]
    body["containers"] = [worker]
    body.pop("initContainers", None)


def _strings(resources: Object) -> Object:
    """Resources whose quantities are strings, which every version of the client takes."""
    return {
        part: {name: str(amount) for name, amount in values.items()} if isinstance(values, dict) else values
        for part, values in deepcopy(resources).items()
    }


def _set_gpus(resources: Object, resource: str, gpus: int) -> None:
    """GPUs are asked for in whole, and as much as the limit says."""
    for part in ("requests", "limits"):
        amounts = resources.setdefault(part, {})
        amounts.pop(resource, None)
        if gpus:
            amounts[resource] = str(gpus)
    for part in ("requests", "limits"):
        if not resources[part]:
            del resources[part]


def _let_requests_fit(resources: Object, pods: PodConfig) -> None:
    """A limit of the job's goes with the same request unless it gives one: the template's may be above it."""
    for name, amount in pods.resources.limits.items():
        if name not in pods.resources.requests:
            resources.setdefault("requests", {})[name] = amount


def _toleration(item: Toleration) -> Object:
    found = {"key": item.key, "operator": item.operator, "value": item.value, "effect": item.effect}
    return {name: value for name, value in found.items() if value is not None}


def _volume_source(name: str, volume: Volume) -> Object:
    if volume.pvc:
        return {"name": name, "persistentVolumeClaim": {"claimName": volume.pvc}}
    if volume.config_map:
        return {"name": name, "configMap": {"name": volume.config_map}}
    assert volume.empty_dir is not None, "the configuration was checked"
    empty: Object = {"medium": "Memory"} if volume.empty_dir.memory else {}
    if volume.empty_dir.size_limit:
        empty["sizeLimit"] = volume.empty_dir.size_limit
    return {"name": name, "emptyDir": empty}


def _volume_mount(name: str, volume: Volume) -> Object:
    mount: Object = {"name": name, "mountPath": volume.mount_path}
    if volume.sub_path:
        mount["subPath"] = volume.sub_path
    if volume.read_only or volume.config_map:
        mount["readOnly"] = True
    return mount


def _mount(body: Object, source: Object, mount: Object) -> None:
    body["volumes"] = [*(body.get("volumes") or []), source]
    worker = body["containers"][0]
    worker["volumeMounts"] = [*(worker.get("volumeMounts") or []), mount]
