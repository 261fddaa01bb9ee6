"""Each rule for manifests fails on the mistake that it is for, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.helpers.manifests import RULES, check
from tests.helpers.manifests.objects import Cluster, Object
from tests.helpers.manifests.quantities import parse
from tests.helpers.manifests.shipped import NO_KUBECTL, cluster

pytestmark = pytest.mark.skipif(bool(NO_KUBECTL), reason=NO_KUBECTL or "kubectl is there")

Break = Callable[[Cluster], None]
BASE = "overlays/gpu-multinode"
REWARD, ORCHESTRATOR = ("Deployment", "surogate-reward"), ("Deployment", "surogate-orchestrator")
POD = ("spec", "template", "spec")
CONTAINER = (*POD, "containers", 0)


def at(one: Any, path: tuple[str | int, ...]) -> Any:
    """What is at a path."""
    for key in path:
        one = one[key]
    return one


def put(kind: str, name: str, *path: Any) -> Break:
    """Sets the value at a path: the last of `path` is the value."""
    *keys, last, value = path

    def broken(shown: Cluster) -> None:
        one = shown.find(kind, name)
        assert one is not None
        at(one, tuple(keys))[last] = value

    return broken


def drop(kind: str, name: str, *path: str | int) -> Break:
    """Removes what is at a path; without a path the object."""

    def broken(shown: Cluster) -> None:
        one = shown.find(kind, name)
        assert one is not None
        if path:
            del at(one, path[:-1])[path[-1]]
        else:
            shown.objects.remove(one)

    return broken


def add(text: str) -> Break:
    """Adds an object to those there."""
    return lambda shown: shown.objects.append(yaml.safe_load(text))


def template(file: str, change: Callable[[Object], object]) -> Break:
    """Changes a pod template of the launcher."""

    def broken(shown: Cluster) -> None:
        (config,) = (one for one in shown.of("ConfigMap") if file in one.get("data", {}))
        pod = yaml.safe_load(config["data"][file])
        change(pod["spec"])
        config["data"][file] = yaml.safe_dump(pod)

    return broken


def limits(spec: Object, part: str) -> dict[str, str]:
    """Resources of a template's container."""
    found: dict[str, str] = spec["containers"][0]["resources"][part]
    return found


JOB = """
apiVersion: batch/v1
kind: Job
metadata: {name: seed, namespace: surogate}
spec:
  template: {spec: null}
"""


def job(shown: Cluster) -> None:
    """A Job with the reward service's pod, which restarts always."""
    made = yaml.safe_load(JOB)
    reward = shown.find(*REWARD)
    assert reward is not None
    made["spec"]["template"] = {"metadata": {"labels": {"job": "seed"}}, "spec": at(reward, POD)}
    shown.objects.append(made)


HPA = """
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: reward, namespace: surogate}
spec:
  minReplicas: 4
  maxReplicas: 2
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: surogate-reward}
"""

MISTAKES: list[tuple[str, str, Break]] = [
    ("quantities_are_legal", "memory of 2Gb", put(*REWARD, *CONTAINER, "resources", "limits", "memory", "2Gb")),
    ("quantities_are_legal", "a claim of -1Gi", put("PersistentVolumeClaim", "surogate-orchestrator", "spec", "resources", "requests", "storage", "-1Gi")),
    ("requests_are_within_limits", "a request above its limit", put(*REWARD, *CONTAINER, "resources", "requests", "memory", "64Gi")),
    ("gpus_are_requested_as_limited", "GPU request other than the limit", template("trainer.yaml", lambda spec: limits(spec, "limits").update({"nvidia.com/gpu": "2"}))),
    ("gpus_are_requested_as_limited", "a GPU request without a limit", template("inference.yaml", lambda spec: limits(spec, "limits").pop("nvidia.com/gpu"))),
    ("gpus_are_whole", "half a GPU", template("trainer.yaml", lambda spec: [limits(spec, part).update({"nvidia.com/gpu": "0.5"}) for part in ("requests", "limits")])),
    ("resources_are_bounded", "no limit of memory", template("reward.yaml", lambda spec: limits(spec, "limits").pop("cpu"))),
    ("shared_memory_is_sized", "/dev/shm on disk", template("trainer.yaml", lambda spec: spec["volumes"][-1]["emptyDir"].pop("medium"))),
    ("shared_memory_is_sized", "/dev/shm as large as the container", template("trainer.yaml", lambda spec: spec["volumes"][-1]["emptyDir"].update({"sizeLimit": "128Gi"}))),
    ("disks_fit_their_limit", "a folder above the limit of disk", put(*REWARD, *POD, "volumes", 1, "emptyDir", "sizeLimit", "9Gi")),
    ("pods_are_restricted", "root", put(*REWARD, *POD, "securityContext", "runAsUser", 0)),
    ("pods_are_restricted", "runAsNonRoot missing", lambda shown: [drop(*REWARD, *path, "securityContext", "runAsNonRoot")(shown) for path in (POD, CONTAINER)] and None),
    ("pods_are_restricted", "privilege escalation", drop(*REWARD, *CONTAINER, "securityContext", "allowPrivilegeEscalation")),
    ("pods_are_restricted", "privileged", put(*REWARD, *CONTAINER, "securityContext", "privileged", True)),
    ("pods_are_restricted", "capabilities kept", put(*REWARD, *CONTAINER, "securityContext", "capabilities", {})),
    ("pods_are_restricted", "a capability added", put(*REWARD, *CONTAINER, "securityContext", "capabilities", "add", ["SYS_PTRACE"])),
    ("pods_are_restricted", "no seccomp profile", drop(*REWARD, *POD, "securityContext", "seccompProfile")),
    ("pods_are_restricted", "the host's network", put(*REWARD, *POD, "hostNetwork", True)),
    ("pods_are_restricted", "a port of the host", put(*REWARD, *CONTAINER, "ports", 0, "hostPort", 50051)),
    ("pods_are_restricted", "a folder of the host", template("trainer.yaml", lambda spec: spec["volumes"][0].update({"hostPath": {"path": "/"}}))),
    ("root_is_read_only", "a root to write to", put(*REWARD, *CONTAINER, "securityContext", "readOnlyRootFilesystem", False)),
    ("root_is_read_only", "nowhere to write temporary files", lambda shown: _unmount(shown, "/tmp")),
    ("user_is_the_images", "a user that /etc/passwd does not have", put(*REWARD, *POD, "securityContext", "runAsUser", 4711)),
    ("service_links_are_off", "service links", drop(*REWARD, *POD, "enableServiceLinks")),
    ("mounts_have_volumes", "a mount without its volume", lambda shown: at(shown.find(*REWARD), POD)["volumes"].pop()),
    ("mounts_have_volumes", "a volume that nobody mounts", lambda shown: at(shown.find(*REWARD), POD)["volumes"].append({"name": "more", "emptyDir": {}})),
    ("probes_have_one_handler", "a probe with two handlers", put(*REWARD, *CONTAINER, "readinessProbe", "tcpSocket", {"port": 50051})),
    ("probes_are_there", "no startup probe", drop(*REWARD, *CONTAINER, "startupProbe")),
    ("probes_are_there", "a probe of a port that is not there", put(*REWARD, *CONTAINER, "livenessProbe", "grpc", "port", 50099)),
    ("probes_are_there", "liveness that means readiness", put(*REWARD, *CONTAINER, "livenessProbe", "grpc", "service", "surogate.v1.RewardService")),
    ("there_is_time_to_end", "less grace than preStop and drain", put(*REWARD, *POD, "terminationGracePeriodSeconds", 45)),
    ("there_is_time_to_end", "no preStop", drop(*REWARD, *CONTAINER, "lifecycle")),
    ("images_are_pinned", "latest", put(*REWARD, *CONTAINER, "image", "registry.example.org:5000/surogate-reward:latest")),
    ("images_are_pinned", "no tag", put(*REWARD, *CONTAINER, "image", "registry.example.org:5000/surogate-reward")),
    ("selectors_match_their_templates", "a selector that its pods do not match", put("StatefulSet", "surogate-postgres", "spec", "selector", "matchLabels", {"app": "x"})),
    ("services_select_one_kind_of_pods", "a Service that selects nothing", put("Service", "surogate-reward", "spec", "selector", {"app": "reward"})),
    ("services_select_one_kind_of_pods", "a Service that selects the jobs' own reward pods too", drop("Service", "surogate-reward", "spec", "selector", "app.kubernetes.io/instance")),
    ("services_select_one_kind_of_pods", "a Service to a port that is not there", put("Service", "surogate-reward", "spec", "ports", 0, "targetPort", "http")),
    ("restarts_are_possible", "a Job that restarts always", job),
    ("scaling_is_bounded", "an HPA with its maximum below its minimum", add(HPA)),
    ("scaling_is_bounded", "a ScaledObject with its maximum below its minimum", put("ScaledObject", "surogate-reward", "spec", "maxReplicaCount", 1)),
    ("scaling_is_bounded", "replicas that two set", put(*REWARD, "spec", "replicas", 2)),
    ("budgets_have_one_bound", "a budget with both bounds", put("PodDisruptionBudget", "surogate-reward", "spec", "minAvailable", 1)),
    ("budgets_have_one_bound", "a budget of nothing", put("PodDisruptionBudget", "surogate-reward", "spec", "selector", {"matchLabels": {"app": "x"}})),
    ("budgets_have_one_bound", "a percentage of pods that nobody scales", put("PodDisruptionBudget", "surogate-inference", "spec", "minAvailable", "50%")),
    ("names_are_legal", "a name with an underscore", put(*REWARD, *CONTAINER, "name", "reward_service")),
    ("names_are_legal", "a Service whose name begins with a digit", add("{apiVersion: v1, kind: Service, metadata: {name: 3x, namespace: surogate}, spec: {selector: {app.kubernetes.io/component: postgres}, ports: [{port: 5432}]}}")),
    ("names_are_legal", "a port's name of more than 15 letters", put("StatefulSet", "surogate-postgres", *CONTAINER, "ports", 0, "name", "postgresql-server")),
    ("objects_are_there_once", "an object twice", lambda shown: shown.objects.append(shown.objects[-1])),
    ("objects_are_there_once", "an object of another namespace", put("PodDisruptionBudget", "surogate-reward", "metadata", "namespace", "default")),
    ("volumes_have_one_writer", "two orchestrators on a volume", put(*ORCHESTRATOR, "spec", "strategy", {"type": "RollingUpdate"})),
    ("volumes_have_one_writer", "a volume that many nodes mount", put("PersistentVolumeClaim", "surogate-orchestrator", "spec", "accessModes", ["ReadWriteMany"])),
    ("references_of_pods_lead_somewhere", "a ConfigMap that is not there", put(*REWARD, *CONTAINER, "envFrom", 0, "configMapRef", "name", "x")),
    ("references_of_pods_lead_somewhere", "a Secret that nobody makes", drop("Certificate", "surogate-worker")),
    ("references_of_pods_lead_somewhere", "a claim that is not there", lambda shown: _volume(shown, "state")["persistentVolumeClaim"].update(claimName="x")),
    ("references_of_pods_lead_somewhere", "an account that is not there", template("trainer.yaml", lambda spec: spec.update(serviceAccountName="x"))),
    ("references_of_pods_lead_somewhere", "a PriorityClass that is not there", put(*REWARD, *POD, "priorityClassName", "x")),
    ("references_of_others_lead_somewhere", "a Service that is not there", put("StatefulSet", "surogate-postgres", "spec", "serviceName", "x")),
    ("references_of_others_lead_somewhere", "a queue that is not there", put("LocalQueue", "surogate", "spec", "clusterQueue", "x")),
    ("keys_are_there", "a key that is not there", drop("ConfigMap", "surogate-workers", "data", "AWS_DEFAULT_REGION")),
    ("variables_are_set_once", "a variable twice", lambda shown: at(shown.find(*ORCHESTRATOR), CONTAINER)["env"].append({"name": "PGPASSWORD", "value": "x"})),
    ("everything_is_denied_first", "no default", drop("NetworkPolicy", "default-deny")),
    ("edges_select_something", "an edge from nothing", put("NetworkPolicy", "to-object-store", "spec", "podSelector", {"matchLabels": {"app": "x"}})),
    ("edges_select_something", "an edge to a port that is not there", put("NetworkPolicy", "metrics-from-monitoring", "spec", "ingress", 0, "ports", 0, "port", 9099)),
    ("edges_are_open_at_both_ends", "a call that is not let in", drop("NetworkPolicy", "inference-from-trainer")),
    ("edges_are_open_at_both_ends", "a call that may not leave", drop("NetworkPolicy", "orchestrator-to-postgres")),
    ("roles_are_narrow", "Secrets", lambda shown: at(shown.find("Role", "surogate-orchestrator"), ("rules", 1, "resources")).append("secrets")),
    ("roles_are_narrow", "a wildcard", put("Role", "surogate-orchestrator", "rules", 0, "verbs", ["*"])),
    ("roles_are_narrow", "a role of the whole cluster", add("{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRole, metadata: {name: x, namespace: surogate}, rules: []}")),
    ("tokens_are_mounted_where_needed", "a token of an account without a role", put(*REWARD, *POD, "automountServiceAccountToken", True)),
    ("tokens_are_mounted_where_needed", "nothing said about the token", drop(*REWARD, *POD, "automountServiceAccountToken")),
    ("namespaces_are_restricted", "a namespace for every pod", put("Namespace", "surogate", "metadata", "labels", {})),
]  # fmt: skip


def _volume(shown: Cluster, name: str) -> Object:
    volumes = at(shown.find(*ORCHESTRATOR), POD)["volumes"]
    found: Object = next(volume for volume in volumes if volume["name"] == name)
    return found


def _unmount(shown: Cluster, path: str) -> None:
    container = at(shown.find(*REWARD), CONTAINER)
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["mountPath"] != path]


@pytest.mark.parametrize(("rule", "mistake", "broken"), MISTAKES, ids=[mistake for _, mistake, _ in MISTAKES])
def test_a_mistake_is_found(rule: str, mistake: str, broken: Break) -> None:
    shown = cluster(BASE)
    broken(shown)
    found = {finding.rule for finding in check(shown)}
    assert rule in found, mistake


def test_every_rule_has_its_mistake() -> None:
    assert {rule for rule, _, _ in MISTAKES} == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize(
    ("quantity", "number"),
    [("500m", 0.5), ("2", 2), (4, 4), ("1Ki", 1024), ("1.5G", 1.5e9), ("1e3", 1000), (".5", 0.5)],
)
def test_quantities_are_read(quantity: object, number: float) -> None:
    assert parse(quantity) == number


@pytest.mark.parametrize("quantity", ["", "2Gb", "1 Gi", "Gi", "0x10", "1,5", True, None])
def test_what_is_no_quantity_is_refused(quantity: object) -> None:
    with pytest.raises(ValueError, match="no quantity"):
        parse(quantity)
