"""The objects of a job, and what job authors cannot have: each attack is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator_svc.launchers.base import WorkerSpec
from orchestrator_svc.launchers.kubernetes import names
from orchestrator_svc.launchers.kubernetes.manifests import Manifests, Owner
from orchestrator_svc.launchers.kubernetes.policy import check_cluster, check_pod
from orchestrator_svc.launchers.kubernetes.templates import Templates
from orchestrator_svc.settings import OrchestratorSettings
from surogate.client.jobs import job_config
from surogate.config.check import check_files
from surogate.config.cluster import ClusterConfig
from surogate.config.job import resolve_job
from surogate.errors import ConfigError, PermissionDeniedError
from tests.helpers.orchestrator import sft_config

OWNER = Owner("ConfigMap", "v1", "sg-one", "anchor-uid")
TEMPLATE: dict[str, Any] = {
    "spec": {
        "containers": [
            {
                "name": "worker",
                "image": "surogate-trainer:1",
                "command": ["surogate-trainer"],
                "env": [
                    {"name": "SUROGATE_TRAINER_LISTEN", "value": "0.0.0.0:6000"},
                    {"name": "SUROGATE_TOKEN", "valueFrom": {"secretKeyRef": {"name": "tokens", "key": "workers"}}},
                ],
                "resources": {"limits": {"memory": "8Gi", "nvidia.com/gpu": 1}, "requests": {"nvidia.com/gpu": 1}},
                "volumeMounts": [{"name": "tls", "mountPath": "/tls"}, {"name": "tmp", "mountPath": "/tmp"}],
            }
        ],
        "volumes": [{"name": "tls", "secret": {"secretName": "tls"}}, {"name": "tmp", "emptyDir": {}}],
    }
}


def worker(
    cluster: dict[str, Any] | None = None, spec: WorkerSpec | None = None, template: Any = None, **train: Any
) -> Any:
    config = resolve_job({**sft_config(**train), "cluster": cluster or {}})
    made = Manifests("one", "run", config, OrchestratorSettings())
    return made.worker(spec or WorkerSpec("trainer"), 1, template or TEMPLATE, OWNER)


def made_from(template: Any) -> Any:
    return worker(template=template)["spec"]["template"]


def pod(*args: Any, **kwargs: Any) -> Any:
    return worker(*args, **kwargs)["spec"]["template"]["spec"]


def variables(spec: Any) -> dict[str, Any]:
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in spec["containers"][0]["env"]}


def test_a_job_runs_its_pod_once_and_is_replaced_when_the_cluster_moves_it() -> None:
    spec = worker()["spec"]
    assert (spec["backoffLimit"], spec["completions"], spec["template"]["spec"]["restartPolicy"]) == (0, 1, "Never")
    [rule] = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "Ignore" and rule["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert spec["podReplacementPolicy"] == "Failed"
    assert "suspend" not in spec and spec["ttlSecondsAfterFinished"] > 0


def test_what_the_template_leaves_out_is_safe() -> None:
    spec = pod()
    assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
    assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    context = spec["containers"][0]["securityContext"]
    assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    check_pod({"spec": spec}, "trainer 0")


def test_several_nodes_meet_at_the_first() -> None:
    job = worker({"trainer": {"nodes": 3}}, gpus=2)
    spec = job["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (3, 3, "Indexed")
    found = variables(spec["template"]["spec"])
    assert found["MASTER_ADDR"] == f"{job['metadata']['name']}-0.sg-one-trainer.surogate.svc"
    assert (found["MASTER_PORT"], found["NUM_NODES"], found["GPUS_PER_NODE"]) == ("29500", "3", "2")
    assert found["NODE_RANK"]["fieldRef"]["fieldPath"].endswith("['batch.kubernetes.io/job-completion-index']")
    assert spec["template"]["spec"]["subdomain"] == "sg-one-trainer"


def test_gpus_are_those_of_the_job_in_whole_and_as_strings() -> None:
    resources = pod(gpus=2)["containers"][0]["resources"]
    assert resources["limits"] == {"memory": "8Gi", "nvidia.com/gpu": "2"}
    assert resources["requests"]["nvidia.com/gpu"] == "2"
    none = pod({"trainer": {"gpus": 0}})["containers"][0]["resources"]
    assert "nvidia.com/gpu" not in none["limits"] and "requests" not in none


def test_the_cluster_block_reaches_the_pod() -> None:
    job = worker(
        {
            "queue": "research",
            "priority_class": "high",
            "max_runtime": 60,
            "nodeSelector": {"pool": "a100"},
            "tolerations": [{"key": "nvidia.com/gpu"}],
            "trainer": {
                "image": "mine:1",
                "resources": {"limits": {"memory": "16Gi", "cpu": 4}},
                "volumes": [{"mountPath": "/data/x", "pvc": "corpus", "readOnly": True}],
                "secrets": [{"env": "HF_TOKEN", "name": "hub", "key": "token"}],
            },
        }
    )
    assert job["metadata"]["labels"][names.QUEUE] == "research" and job["spec"]["suspend"] is True
    assert job["spec"]["activeDeadlineSeconds"] == 60
    spec = job["spec"]["template"]["spec"]
    assert spec["priorityClassName"] == "high" and spec["nodeSelector"] == {"pool": "a100"}
    assert {"key": "nvidia.com/gpu", "operator": "Exists"} in spec["tolerations"]
    container = spec["containers"][0]
    assert container["image"] == "mine:1"
    assert container["resources"]["limits"] == {"memory": "16Gi", "cpu": "4", "nvidia.com/gpu": "1"}
    assert container["resources"]["requests"] == {"memory": "16Gi", "cpu": "4", "nvidia.com/gpu": "1"}
    assert {"name": "job-0", "persistentVolumeClaim": {"claimName": "corpus"}} in spec["volumes"]
    assert variables(spec)["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}


def test_the_template_says_where_the_service_listens() -> None:
    found = variables(pod())
    assert found["SUROGATE_TRAINER_LISTEN"] == "0.0.0.0:6000"
    assert found["SUROGATE_TRAINER_METRICS_LISTEN"] == "0.0.0.0:9090"


def test_an_image_of_the_authors_gets_none_of_the_operators_secrets() -> None:
    spec = pod(spec=WorkerSpec("reward", 1, image="theirs:1"))
    container = spec["containers"][0]
    assert container["image"] == "theirs:1" and "command" not in container
    assert "SUROGATE_TOKEN" not in variables(spec)
    assert not any("secret" in volume for volume in spec["volumes"])
    assert container["readinessProbe"] == {"tcpSocket": {"port": 50051}, "periodSeconds": 5}


@pytest.mark.parametrize("job_id", ["1", "a" * 63, "grpo-20260101-093000-1f2e", "x" * 35 + "-y"])
def test_names_are_legal_and_short_enough(job_id: str) -> None:
    name = names.worker_name(job_id, "inference", 999, 999)
    assert len(name) <= 55 and name[0].isalpha() and name == name.lower()
    assert names.stem("a" * 62) != names.stem("a" * 63)


SECRETS = {"trainer": {"secrets": [{"env": "X", "name": "other-team", "key": "token"}]}}


@pytest.mark.parametrize(
    ("cluster", "key"),
    [
        (SECRETS, "cluster.trainer.secrets.0"),
        ({"trainer": {"image": "evil:1"}}, "cluster.trainer.image"),
        ({"reward": {"volumes": [{"mount_path": "/data", "pvc": "theirs"}]}}, "cluster.reward.volumes.0.pvc"),
        (
            {"trainer": {"volumes": [{"mount_path": "/data", "config_map": "c"}]}},
            "cluster.trainer.volumes.0.config_map",
        ),
        ({"trainer": {"volumes": [{"mount_path": "/etc", "empty_dir": {}}]}}, "cluster.trainer.volumes.0.mount_path"),
        (
            {"trainer": {"volumes": [{"mount_path": "/database", "empty_dir": {}}]}},
            "cluster.trainer.volumes.0.mount_path",
        ),
        ({"priority_class": "system-node-critical"}, "cluster.priority_class"),
        ({"tolerations": [{"key": "node-role.kubernetes.io/control-plane"}]}, "cluster.tolerations.0.key"),
        (
            {"trainer": {"resources": {"limits": {"devices.kubevirt.io/kvm": 1}}}},
            "cluster.trainer.resources.limits.devices.kubevirt.io/kvm",
        ),
        ({"inference": {"env": {"LD_PRELOAD": "/data/x.so"}}}, "cluster.inference.env.LD_PRELOAD"),
        ({"inference": {"env": {"SUROGATE_INFERENCE_TOKEN_FILE": ""}}}, "cluster.inference.env"),
        ({"inference": {"env": {"PYTHONPATH": "/data"}}}, "cluster.inference.env.PYTHONPATH"),
    ],
)
def test_what_the_operator_has_not_allowed_is_refused(cluster: Any, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_cluster(ClusterConfig.model_validate(cluster), OrchestratorSettings())
    assert refused.value.violations[0].field.startswith(key)


def test_gpus_by_whatever_name_they_have_need_no_permission() -> None:
    ours = ClusterConfig.model_validate({"trainer": {"resources": {"limits": {"gpu.intel.com/i915": 1, "cpu": 2}}}})
    check_cluster(ours, OrchestratorSettings(gpu_resource="gpu.intel.com/i915"))


def test_what_the_operator_allows_is_taken() -> None:
    allowed = OrchestratorSettings(allowed_secrets=["hub/token"], allowed_images=["registry/team/*"])
    ours = {"trainer": {"image": "registry/team/x:1", "secrets": [{"env": "X", "name": "hub", "key": "token"}]}}
    check_cluster(ClusterConfig.model_validate(ours), allowed)
    with pytest.raises(ConfigError, match="hub/admin"):
        theirs = {"trainer": {"secrets": [{"env": "X", "name": "hub", "key": "admin"}]}}
        check_cluster(ClusterConfig.model_validate(theirs), allowed)


@pytest.mark.parametrize(
    "key",
    ["host_path", "hostNetwork", "privileged", "service_account", "securityContext", "hostPID", "run_as_user"],
)
@pytest.mark.parametrize("where", ["cluster", "trainer", "volume"])
def test_there_is_no_key_for_what_nobody_may_have(key: str, where: str) -> None:
    volume = {"mount_path": "/data", "empty_dir": {}}
    given: dict[str, Any] = {
        "cluster": {key: True},
        "trainer": {"trainer": {key: True}},
        "volume": {"trainer": {"volumes": [{**volume, key: "/"}]}},
    }[where]
    with pytest.raises(ConfigError, match="unknown key"):
        resolve_job({**sft_config(), "cluster": given})


@pytest.mark.parametrize("path", ["/data/../etc", "data", "/", "/data:/etc", "/data/./x/.."])
def test_mount_paths_do_not_climb(path: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.trainer\.volumes\.0\.mount_path"):
        resolve_job({**sft_config(), "cluster": {"trainer": {"volumes": [{"mount_path": path, "empty_dir": {}}]}}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"hostPID": True}, "hostPID"),
        ({"nodeName": "n"}, "nodeName"),
        ({"automountServiceAccountToken": True}, "automountServiceAccountToken"),
        ({"volumes": [{"name": "h", "hostPath": {"path": "/"}}]}, "hostPath"),
        ({"securityContext": {"runAsUser": 0}}, "root"),
        ({"securityContext": {"runAsNonRoot": False}}, "runAsNonRoot"),
        ({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}, "seccomp"),
        ({"container": {"privileged": True}}, "privileged"),
        ({"container": {"allowPrivilegeEscalation": True}}, "gain privileges"),
        ({"container": {"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}}, "SYS_ADMIN"),
        ({"container": {"runAsUser": 0}}, "root"),
        ({"ports": [{"containerPort": 1, "hostPort": 1}]}, "port of the host"),
        ({"token": {}}, "token for the API server"),
        ({"token": {"audience": "https://kubernetes.default.svc.cluster.local"}}, "token for the API server"),
        ({"container": {"appArmorProfile": {"type": "Unconfined"}}}, "AppArmor"),
        ({"annotations": {"container.apparmor.security.beta.kubernetes.io/worker": "unconfined"}}, "AppArmor"),
        ({"container": {"seLinuxOptions": {"type": "spc_t"}}}, "SELinux"),
        ({"container": {"procMount": "Unmasked"}}, "/proc"),
        ({"container": {"windowsOptions": {"hostProcess": True}}}, "host process"),
        ({"securityContext": {"sysctls": [{"name": "net.core.somaxconn", "value": "1"}]}}, "sysctls"),
        ({"hostIPC": True}, "hostIPC"),
        ({"hostUsers": True}, "hostUsers"),
        ({"readinessProbe": {"tcpSocket": {"port": 1, "host": "10.0.0.1"}}}, "name no host"),
        ({"lifecycle": {"preStop": {"httpGet": {"port": 1, "host": "169.254.169.254"}}}}, "name no host"),
        ({"volumes": [{"name": "h", "image": {"reference": "x"}}]}, "volume h is a image"),
        ({"initContainers": [{"name": "i", "image": "x", "securityContext": {"privileged": True}}]}, "privileged"),
    ],
)
def test_a_template_cannot_give_a_job_the_host_or_root(change: dict[str, Any], said: str) -> None:
    container = {**TEMPLATE["spec"]["containers"][0], "securityContext": change.pop("container", {})}
    container |= {key: change.pop(key) for key in ("ports", "readinessProbe", "lifecycle") if key in change}
    spec = {**TEMPLATE["spec"], "containers": [container]}
    if "token" in change:
        token = {"path": "token", **change.pop("token")}
        spec["volumes"] = [{"name": "t", "projected": {"sources": [{"serviceAccountToken": token}]}}]
    template = {"metadata": {"annotations": change.pop("annotations", {})}, "spec": {**spec, **change}}
    with pytest.raises(PermissionDeniedError, match=said):
        check_pod(made_from(template), "trainer 0")


def test_a_template_adds_labels_and_annotations_and_impersonates_nobody(tmp_path: Path) -> None:
    theirs = {"surogate.dev/job": "another", "app.kubernetes.io/component": "orchestrator", "team": "a"}
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "sg-another", "uid": "u"}
    metadata = {"labels": theirs, "ownerReferences": [owner], "finalizers": ["a/b"], "name": "x", "namespace": "y"}
    (tmp_path / "trainer.yaml").write_text(yaml.safe_dump({"metadata": metadata, **TEMPLATE}))
    made = made_from(Templates(tmp_path).load("trainer"))["metadata"]
    assert made.keys() == {"labels", "annotations"}
    assert made["annotations"] == {"kubectl.kubernetes.io/default-container": "worker"}
    labels = made["labels"]
    assert (labels["surogate.dev/job"], labels["app.kubernetes.io/component"], labels["team"]) == (
        "one",
        "trainer",
        "a",
    )


def test_templates_are_pods_in_files(tmp_path: Path) -> None:
    templates = Templates(tmp_path)
    with pytest.raises(ConfigError, match=r"trainer\.yaml cannot be read"):
        templates.load("trainer")
    (tmp_path / "trainer.yaml").write_text("kind: Pod\nspec: {}\n")
    with pytest.raises(ConfigError, match=r"must have spec\.containers"):
        templates.load("trainer")
    (tmp_path / "trainer.yaml").write_text(yaml.safe_dump({"kind": "PodTemplate", "template": TEMPLATE}))
    assert templates.load("trainer")["spec"] == TEMPLATE["spec"]


def test_nodes_and_replicas_are_said_once() -> None:
    config = {**sft_config(distributed={"num_nodes": 2}), "cluster": {"trainer": {"nodes": 4}}}
    with pytest.raises(ConfigError, match=r"cluster\.trainer\.nodes: is 4, and train\.distributed\.num_nodes is 2"):
        resolve_job(config)
    job = resolve_job({**sft_config(), "cluster": {"trainer": {"nodes": 4}}})
    assert job.train.distributed.num_nodes == 4
    assert resolve_job(job.to_dict()) == job


def test_a_cluster_file_is_known_by_its_keys_and_joins_a_job(tmp_path: Path) -> None:
    file = tmp_path / "research.yaml"
    file.write_text("queue: research\ntrainer: {gpus: 8}\n")
    [section] = check_files([file]).sections
    assert not section.errors and section.resolved["trainer"]["gpus"] == 8
    config = job_config("sft", sft_config()["train"], cluster=str(file), overrides=["cluster.queue=other"])
    assert resolve_job(config).cluster == ClusterConfig.model_validate({"queue": "other", "trainer": {"gpus": 8}})
