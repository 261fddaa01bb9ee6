"""The Kubernetes manifests, rendered: schemas, rules of our own, and what our own services need of them."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator_svc.allowed import check_inputs
from orchestrator_svc.settings import OrchestratorSettings
from surogate.config.service import ServiceSettings
from surogate.errors import ConfigError
from tests.helpers.manifests import check
from tests.helpers.manifests.objects import CLUSTER_KINDS, Cluster, Pod, load, parse, pods_of, render
from tests.helpers.manifests.shipped import GIVEN, KUSTOMIZATIONS, NO_KUBECTL, ROOT, cluster, text

pytestmark = pytest.mark.skipif(bool(NO_KUBECTL), reason=NO_KUBECTL or "kubectl is there")
VERSION = "1.36"
OTHERS = ("kueue.x-k8s.io/", "keda.sh/", "cert-manager.io/", "monitoring.coreos.com/", "surogate.dev/")
"""Groups of resources that are not Kubernetes' own, for which it has no schemas."""


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_our_rules_find_nothing(name: str) -> None:
    assert [str(finding) for finding in check(cluster(name))] == []


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_object_is_of_its_schema_and_has_no_unknown_field(name: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    checked = 0
    for one in cluster(name).objects:
        if not one["apiVersion"].startswith(OTHERS):
            kubernetes_validate.validate(one, VERSION, strict=True)
            checked += 1
    assert checked > 15


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_the_pod_templates_are_of_a_pods_schema(name: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    (templates,) = (one for one in cluster(name).of("ConfigMap") if "trainer.yaml" in one["data"])
    assert sorted(templates["data"]) == ["inference.yaml", "reward.yaml", "trainer.yaml"]
    for file, content in templates["data"].items():
        template = yaml.safe_load(content)
        assert template.keys() == {"metadata", "spec"}, "what a pod template has"
        pod = as_pod(template)
        kubernetes_validate.validate(pod, VERSION, strict=True)
        assert pod["metadata"]["labels"]["app.kubernetes.io/component"] == file.removesuffix(".yaml")
        assert pod["spec"]["containers"][0]["image"].startswith(f"surogate-{file.removesuffix('.yaml')}:")


SKIPPED = {
    "CKV_K8S_15": "imagePullPolicy Always: tags are versions, and a node without the registry should still start pods",
    "CKV_K8S_43": "digests: the images are built by whoever installs them; `images:` in an overlay sets digests",
    "CKV_K8S_38": "a mounted token: the orchestrator's, which is what its role is for; our rules check the others",
    "CKV_K8S_35": "secrets as variables: libpq and the AWS SDK read them there",
}
"""checkov's rules that we break, and why."""


def checkov() -> str:
    """The program, installed in an environment of its own by `make checkov`; empty where it is not."""
    beside = ROOT / ".venv" / "checkov" / "bin" / "checkov"
    return str(beside) if beside.exists() else shutil.which("checkov") or ""


@pytest.mark.slow
@pytest.mark.skipif(not checkov(), reason="needs checkov: make checkov")
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_checkov_finds_nothing_but_what_we_explain(name: str, tmp_path: Path) -> None:
    file = tmp_path / "manifests.yaml"
    file.write_text(text(name))
    skip = [part for rule in SKIPPED for part in ("--skip-check", rule)]
    command = [
        checkov(),
        "--framework",
        "kubernetes",
        "--skip-download",
        "--compact",
        "--quiet",
        *skip,
        "-f",
        str(file),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def variables(pod: Pod, shared: Cluster) -> dict[str, str]:
    """Variables that a pod's service finds, as far as they are no secrets."""
    container = pod.service_containers()[0]
    found: dict[str, str] = {}
    for source in container.get("envFrom") or []:
        config = shared.find("ConfigMap", (source.get("configMapRef") or {}).get("name", ""))
        found |= (config or {}).get("data", {})
    return found | {variable["name"]: variable.get("value", "") for variable in container.get("env") or []}


def settings_of(component: str) -> type[ServiceSettings]:
    from inference_svc.settings import InferenceSettings
    from orchestrator_svc.settings import OrchestratorSettings
    from reward_svc.settings import BuiltInSettings
    from trainer_svc.settings import TrainerSettings

    found: dict[str, type[ServiceSettings]] = {
        "trainer": TrainerSettings,
        "inference": InferenceSettings,
        "orchestrator": OrchestratorSettings,
        "reward": BuiltInSettings,
    }
    return found[component]


def our_pods(name: str) -> list[Pod]:
    """Pods that run our own images."""
    pods = [pod for one in cluster(name).objects for pod in pods_of(one)]
    return [pod for pod in pods if pod.service_containers()[0]["image"].startswith("surogate-")]


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_variables_and_flags_are_settings_of_the_service(name: str) -> None:
    shared = cluster(name)
    for pod in our_pods(name):
        component = pod.labels["app.kubernetes.io/component"]
        prefix = f"SUROGATE_{component.upper()}_"
        known = settings_of(component).model_fields.keys()
        given = variables(pod, shared)
        for variable in given:
            if variable.startswith(prefix):
                assert variable.removeprefix(prefix).lower() in known, f"{pod.where}: {variable}"
        for flag in pod.service_containers()[0].get("args") or []:
            assert flag.removeprefix("--").partition("=")[0].replace("-", "_") in known, f"{pod.where}: {flag}"
        assert float(given[f"{prefix}MAX_CONNECTION_AGE"]) <= 300, "else a new replica gets no calls"
        assert given[f"{prefix}HEALTH_LISTEN"].endswith(":50052"), "where the probes ask"


def test_a_new_replica_gets_calls_within_45_seconds() -> None:
    """A client resolves names again at most every 30 s, and not before a connection ends."""
    for pod in our_pods("base"):
        component = pod.labels["app.kubernetes.io/component"]
        if component in {"inference", "reward"}:
            age = float(variables(pod, cluster("base"))[f"SUROGATE_{component.upper()}_MAX_CONNECTION_AGE"])
            assert age + 22 <= 45, pod.where


def test_probes_ask_for_services_that_there_are() -> None:
    from orchestrator_svc.launchers.base import HEALTH_SERVICE

    services = {**HEALTH_SERVICE, "inference": "surogate.v1.InferenceService", "orchestrator": "surogate.v1.JobService"}
    for pod in our_pods("overlays/gpu-multinode"):
        container = pod.service_containers()[0]
        assert container["readinessProbe"]["grpc"]["service"] == services[pod.labels["app.kubernetes.io/component"]]
        assert container["livenessProbe"]["grpc"]["service"] == "grpc.health.v1.Health"


COMPONENTS = sorted(path.name for path in (ROOT / "k8s" / "components").iterdir())


@pytest.mark.parametrize("base", ["base", "overlays/cpu-kind"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_goes_on_top(component: str, base: str, tmp_path: Path) -> None:
    """Also by itself, so that an overlay of one's own can take any of them; with the same checks as what is shipped."""
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    overlay = tmp_path / "k8s" / "overlays" / "mine"
    overlay.mkdir()
    kustomization: dict[str, Any] = {"resources": [f"../../{base}"], "components": [f"../../components/{component}"]}
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    rendered = render(overlay)
    assert rendered != text(base)
    shown = load(rendered, GIVEN)
    assert [str(finding) for finding in check(shown)] == []
    assert_valid(shown)


def assert_valid(shown: Cluster) -> None:
    """Each object of Kubernetes' own, and each template of a pod, is of its schema, without an unknown field."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for one in shown.objects:
        if one["kind"] == "ConfigMap" and "trainer.yaml" in one["data"]:
            for content in one["data"].values():
                kubernetes_validate.validate(as_pod(parse(content)), VERSION, strict=True)
        if not one["apiVersion"].startswith(OTHERS) and one["kind"] != "CustomResourceDefinition":
            kubernetes_validate.validate(one, VERSION, strict=True)


def as_pod(template: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": "x", **template["metadata"]}}


class OncePerKey(yaml.SafeLoader):
    """YAML in which a mapping has each key once. Others take the last, and an API server refuses it."""


def _mapping(loader: OncePerKey, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = {key for key in keys if keys.count(key) > 1}
    assert not twice, f"{', '.join(map(str, twice))} twice{node.start_mark}"
    return loader.construct_mapping(node, deep=True)


OncePerKey.add_constructor("tag:yaml.org,2002:map", _mapping)


@pytest.mark.parametrize("folder", ["k8s", "examples"])
def test_no_key_stands_twice(folder: str) -> None:
    files = [file for file in (ROOT / folder).rglob("*.yaml") if file.name != "crd.yaml"]
    assert len(files) > 10
    for file in files:
        for _ in yaml.load_all(file.read_text(encoding="utf-8"), OncePerKey):
            pass
    with pytest.raises(AssertionError, match="a twice"):
        yaml.load("{b: {a: 1, a: 2}}", OncePerKey)


def overlay_of_the_readme(first_line: str) -> dict[str, Any]:
    """The kustomization that k8s/README.md shows under a comment."""
    lines = (ROOT / "k8s" / "README.md").read_text(encoding="utf-8").splitlines()
    shown = itertools.takewhile(lambda line: line.startswith("    "), lines[lines.index(f"    {first_line}") :])
    found: dict[str, Any] = yaml.safe_load("\n".join(line[4:] for line in shown))
    return found


def test_the_overlay_of_ones_own_is_as_the_readme_shows_it(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    overlay = tmp_path / "k8s" / "overlays" / "mine"
    overlay.mkdir()
    kustomization = overlay_of_the_readme("# k8s/overlays/mine/kustomization.yaml")
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    shown = load(render(overlay), GIVEN)
    assert [str(finding) for finding in check(shown)] == []
    images = {pod.service_containers()[0]["image"] for one in shown.of("Deployment") for pod in pods_of(one)}
    assert {image.rpartition(":")[0] for image in images} == {
        "registry.example.org/team/surogate-orchestrator",
        "registry.example.org/team/surogate-reward",
    }


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_all_of_it_goes_into_a_namespace_of_another_name(name: str, tmp_path: Path) -> None:
    """By kustomize's `namespace:` and what k8s/README.md has beside it."""
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    overlay = tmp_path / "k8s" / "overlays" / "team-a"
    overlay.mkdir()
    kustomization = overlay_of_the_readme("# k8s/overlays/team-a/kustomization.yaml")
    kustomization["resources"] = [f"../../{name}"]
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    rendered = render(overlay)
    moved = load(rendered, GIVEN)
    for one in moved.of("ClusterQueue", "ResourceFlavor"):
        del one["metadata"]["namespace"]  # as the API server does: kustomize does not know that they have none
    assert [str(finding) for finding in check(moved)] == []
    for one in moved.objects:
        if one["kind"] == "Namespace":
            assert one["metadata"]["name"] == "team-a"
        elif one["kind"] not in CLUSTER_KINDS:
            assert one["metadata"]["namespace"] == "team-a", one["metadata"]["name"]
    for old in ("kubernetes.io/metadata.name: surogate", "surogate.surogate", 'namespace="surogate"', "surogate.svc"):
        assert old not in rendered
    if name == "overlays/gpu-multinode":
        assert "surogate-orchestrator.team-a.svc.cluster.local" in rendered
        assert 'namespace="team-a"' in rendered


def test_keda_asks_for_a_metric_that_there_is() -> None:
    from surogate.reward import metrics as _metrics  # registers them
    from surogate.telemetry.metrics import REGISTRY

    assert _metrics is not None
    known = {metric.name for metric in REGISTRY.collect()}
    (scaled,) = cluster("overlays/gpu-multinode").of("ScaledObject")
    for trigger in scaled["spec"]["triggers"]:
        assert set(re.findall(r"surogate_[a-z_]+", trigger["metadata"]["query"])) <= known


def test_the_pod_that_shows_outputs_holds_to_the_rules_for_what_does_not_serve() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    pod = yaml.safe_load((ROOT / "k8s" / "tools" / "outputs.yaml").read_text(encoding="utf-8"))
    kubernetes_validate.validate(pod, VERSION, strict=True)
    shown = cluster("base")
    shown.objects.append(pod)
    serving = {"probes_are_there", "there_is_time_to_end"}
    assert [str(finding) for finding in check(shown) if finding.rule not in serving] == []


def test_a_jobs_replicas_can_be_scaled_by_keda() -> None:
    file = ROOT / "k8s" / "components" / "keda" / "inference-of-a-job.yaml"
    scaled = yaml.safe_load(file.read_text(encoding="utf-8"))
    definition = cluster("base").find("CustomResourceDefinition", "trainingjobs.surogate.dev")
    assert definition is not None
    target, spec = scaled["spec"]["scaleTargetRef"], definition["spec"]
    (version,) = spec["versions"]
    assert target["apiVersion"] == f"{spec['group']}/{version['name']}"
    assert target["kind"] == spec["names"]["kind"]
    assert version["subresources"]["scale"]["specReplicasPath"] == ".spec.inferenceReplicas"
    assert scaled["spec"]["maxReplicaCount"] > scaled["spec"]["minReplicaCount"]


def test_images_and_tags_are_those_that_make_images_builds() -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for name in KUSTOMIZATIONS:
        for pod in our_pods(name):
            image = pod.service_containers()[0]["image"]
            component = pod.labels["app.kubernetes.io/component"]
            assert image in {f"surogate-{component}:{version}", f"surogate-{component}:{version}-gpu"}


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_jobs_read_what_is_mounted_for_them_alone(name: str) -> None:
    orchestrator = cluster(name).find("Deployment", "surogate-orchestrator")
    assert orchestrator is not None
    (container,) = orchestrator["spec"]["template"]["spec"]["containers"]
    values = {one["name"]: one.get("value") for one in container["env"]}
    roots = [Path(one) for one in json.loads(values["SUROGATE_ORCHESTRATOR_INPUT_ROOTS"])]
    assert set(roots) == {Path(one) for one in OrchestratorSettings(launcher="kubernetes").allowed_mount_roots}
    for good in ("Qwen/Qwen3-8B", "/models/qwen3", "/data/corpus", "s3://bucket/model"):
        check_inputs({"train": {"model": good}}, roots)
    for bad in ("/etc/surogate/tls", "/proc/self/environ", "/models/../etc/passwd", "/home/surogate/.cache/x"):
        with pytest.raises(ConfigError, match="outside of the folders"):
            check_inputs({"train": {"model": bad}}, roots)
