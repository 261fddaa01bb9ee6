"""The launcher's pods, made from the templates that we ship: they hold to the rules for manifests, and the role that we
ship allows what the launcher does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator_svc.launchers.base import WorkerSpec
from orchestrator_svc.launchers.kubernetes.manifests import Manifests, Owner
from orchestrator_svc.launchers.kubernetes.policy import check_pod
from orchestrator_svc.launchers.kubernetes.templates import Templates
from orchestrator_svc.settings import OrchestratorSettings
from surogate.config.job import resolve_job
from tests.helpers.grpo.grpo_job import job_config
from tests.helpers.manifests import check
from tests.helpers.manifests.objects import Cluster, Object
from tests.helpers.manifests.shipped import KUSTOMIZATIONS, NO_KUBECTL, cluster

pytestmark = pytest.mark.skipif(bool(NO_KUBECTL), reason=NO_KUBECTL or "kubectl is there")
OWNER = Owner("ConfigMap", "v1", "sg-one", "uid")
SPECS = [WorkerSpec("trainer"), WorkerSpec("inference", config={"model": "m"}), WorkerSpec("reward")]


def templates_of(shown: Cluster, folder: Path) -> Templates:
    """The templates of an overlay, where the orchestrator finds them."""
    (config,) = (one for one in shown.of("ConfigMap") if "trainer.yaml" in one["data"])
    for file, text in config["data"].items():
        (folder / file).write_text(text)
    return Templates(folder)


def objects_of_a_job(shown: Cluster, folder: Path, **train: Any) -> list[Object]:
    """What the launcher creates for a GRPO job: a Job and a Service for each component."""
    parts = job_config("model")
    config = resolve_job({**parts, "train": {**parts["train"], **train}, "cluster": {"max_runtime": 3600}})
    made = Manifests("one", "run", config, OrchestratorSettings())
    templates = templates_of(shown, folder)
    found = []
    for spec in SPECS:
        found.append(made.worker(spec, 1, templates.load(spec.component), OWNER))
        found.append(made.service(spec.component, OWNER))
        if spec.config is not None:
            found.append(made.worker_config(spec, OWNER))
    for one in found:
        one["metadata"]["namespace"] = "surogate"
    return found


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_the_pods_of_a_job_hold_to_the_rules(name: str, tmp_path: Path) -> None:
    shown = cluster(name)
    made = objects_of_a_job(shown, tmp_path)
    for one in made:
        if one["kind"] == "Job":
            check_pod(one["spec"]["template"], one["metadata"]["name"])
    # In the place of the templates, which are theirs.
    shown.objects[:] = [one for one in shown.objects if "trainer.yaml" not in (one.get("data") or {})] + made
    templates = {"Deployment/surogate-orchestrator: there is no ConfigMap/"}
    found = [finding.text for finding in check(shown)]
    assert [text for text in found if not any(text.startswith(known) for known in templates)] == []


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_the_jobs_objects_are_of_their_schemas(name: str, tmp_path: Path) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for one in objects_of_a_job(cluster(name), tmp_path):
        kubernetes_validate.validate(one, "1.36", strict=True)


def test_gpus_of_a_job_are_those_it_asks_for(tmp_path: Path) -> None:
    made = objects_of_a_job(
        cluster("overlays/gpu-multinode"), tmp_path, distributed={"num_nodes": 2, "gpus_per_node": 8}
    )
    trainer = next(one for one in made if one["metadata"]["name"].startswith("sg-one-trainer-0"))
    resources = trainer["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "8"
    assert trainer["spec"]["completions"] == 2
    volumes = trainer["spec"]["template"]["spec"]["volumes"]
    assert not [volume for volume in volumes if "persistentVolumeClaim" in volume], "two nodes share no volume"


def test_the_role_allows_what_the_launcher_does() -> None:
    """By the calls that are in its code: what each kind of object is created, listed, watched and deleted with."""
    role = cluster("base").find("Role", "surogate-orchestrator")
    assert role is not None
    allowed = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    everything = {"get", "list", "create", "patch", "delete"}
    needed = {(kind, verb) for kind in ("jobs", "services", "configmaps") for verb in everything}
    needed |= {(kind, verb) for kind in ("jobs", "pods") for verb in ("list", "watch")}
    needed |= {("pods/log", "get"), ("events", "list")}
    assert needed <= allowed


def test_the_templates_are_yaml_that_people_can_patch(tmp_path: Path) -> None:
    """No anchors, no tags: what a ConfigMap shows is what there is."""
    (config,) = (one for one in cluster("base").of("ConfigMap") if "trainer.yaml" in one["data"])
    for text in config["data"].values():
        assert not [event for event in yaml.parse(text, yaml.SafeLoader) if isinstance(event, yaml.AliasEvent)]
