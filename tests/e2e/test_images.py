"""The images: really built, without a package index, and run locked down as the manifests have it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator_svc.launchers.base import Component, WorkerSpec
from orchestrator_svc.launchers.kubernetes.manifests import Manifests, Owner
from orchestrator_svc.launchers.kubernetes.templates import Templates
from orchestrator_svc.settings import OrchestratorSettings
from surogate.config.job import resolve_job
from tests.e2e.test_wheel import checkout
from tests.helpers.container_images import container_job as job
from tests.helpers.container_images import containers
from tests.helpers.container_images import example_images as examples
from tests.helpers.container_images.backing import ENVIRONMENT, backing
from tests.helpers.container_images.containers import ROOT, VERSION, Engine
from tests.helpers.grpo.grpo_job import job_config
from tests.helpers.manifests.shipped import NO_KUBECTL, cluster
from tests.helpers.models.tiny import make_tiny_model
from tests.helpers.shell import steps_shown

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(containers.missing()), reason=containers.missing() or "can be built"),
]
LIGHT = ("orchestrator", "reward")
TARGETS = (*LIGHT, "trainer", "inference")
HEAVY_PACKAGES = {"torch", "vllm", "transformers"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean checkout."""
    return checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Iterator[Engine]:
    """An engine that has built all four."""
    engine = Engine(containers.STORAGE or tmp_path_factory.mktemp("containers"))
    try:
        engine.make_base()
        engine.collect_wheels(source, TARGETS)
        engine.build(source, TARGETS)
        yield engine
    finally:
        engine.close()


def locked_down(engine: Engine, container: str) -> None:
    """Whether a container is: what its first process may do, and where it may write."""
    fields = engine.status(container)
    assert fields["Name"] == "tini"
    assert fields["Uid"].split()[0] == "10001"
    assert set(fields["CapEff"]) == {"0"} == set(fields["CapBnd"])
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2", "a filter, that of the runtime"
    assert "Read-only file system" in engine.podman("exec", container, "touch", "/opt/surogate/x", check=False)
    assert engine.podman("exec", container, "id", "--user", "--name") == "surogate"


@pytest.mark.parametrize("target", LIGHT)
def test_an_image_serves_without_root_network_or_a_disk_to_write_to(engine: Engine, target: str) -> None:
    state = ["--tmpfs=/var/lib/surogate:mode=0700,U"] if target == "orchestrator" else []
    engine.start(target, f"surogate-{target}:{VERSION}", flags=state)
    try:
        engine.wait_serving(target, job.SERVICES[target])
        locked_down(engine, target)
        assert engine.stop(target) == 0
        assert '"event": "stopped"' in engine.podman("logs", target), "SIGTERM reaches the service through tini"
    finally:
        engine.remove(target)


def test_the_reward_image_scores(engine: Engine) -> None:
    engine.start("scorer", f"surogate-reward:{VERSION}")
    try:
        engine.wait_serving("scorer", job.SERVICES["reward"])
        program = (
            "import grpc\n"
            "from surogate.v1 import reward_pb2, reward_pb2_grpc\n"
            "stub = reward_pb2_grpc.RewardServiceStub(grpc.insecure_channel('127.0.0.1:50051'))\n"
            "found = stub.ListEnvironments(reward_pb2.ListEnvironmentsRequest(), timeout=20)\n"
            "print(*(environment.id for environment in found.environments))\n"
        )
        assert "reverse-text" in engine.python("scorer", program).split()
        engine.podman("exec", "scorer", "bwrap", "--version")
    finally:
        engine.remove("scorer")


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_says_what_it_is_and_carries_no_more_than_it_needs(engine: Engine, target: str) -> None:
    image = f"surogate-{target}:{VERSION}"
    found = json.loads(engine.podman("inspect", image))[0]
    assert found["Config"]["User"] == "10001:10001"
    assert found["Config"]["Entrypoint"] == ["tini", "--", f"surogate-{target}"]
    labels = found["Labels"]
    assert labels["org.opencontainers.image.title"] == f"surogate-{target}"
    assert labels["org.opencontainers.image.version"] == VERSION
    assert found["Created"].startswith("2023-11-14"), "SOURCE_DATE_EPOCH, not the clock"
    run = ["run", "--rm", "--network=none", *containers.LOCKED]
    listing = "import os; print(*os.listdir('/opt/surogate/lib/python3.11/site-packages'))"
    packages = set(engine.podman(*run, "--entrypoint=python", image, "-c", listing).split())
    assert {"orchestrator_svc", "s3fs", "opentelemetry"} <= packages
    assert not packages & {"pip", "grpc_tools", "triton", "torchvision"}
    assert not packages & HEAVY_PACKAGES or target not in LIGHT
    assert "--listen" in engine.podman(*run, image, "--help")


def test_images_share_what_they_have_in_common(engine: Engine) -> None:
    layers = {target: engine.layers(f"surogate-{target}:{VERSION}") for target in TARGETS}
    shared = len(layers["reward"]) - 2  # less bubblewrap and the package
    assert all(found[:shared] == layers["reward"][:shared] for found in layers.values())
    assert layers["inference"][: len(layers["trainer"]) - 1] == layers["trainer"][:-1], "all but the package"


def test_a_grpo_job_across_the_containers(engine: Engine, tmp_path: Path) -> None:
    """Model, prompts and checkpoints are in an object store: no folder is shared. A step is one trace over all four."""
    for name in ("stored", "files"):
        (tmp_path / name).mkdir()
    job.write_stored(tmp_path / "stored")
    command = job.write_job(tmp_path / "files", run="run")
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    try:
        job.start(engine, "reward", ENVIRONMENT)
        with backing(engine.entering("reward"), tmp_path / "stored") as behind:
            for target in ("trainer", "inference"):
                job.start(engine, target, ENVIRONMENT)
            job.start(engine, "orchestrator", ENVIRONMENT, f"--volume={tmp_path}/files:/files:ro")
            for target, service in job.SERVICES.items():
                engine.wait_serving(target, service, job.PORTS[target], seconds=300)
                locked_down(engine, target)
            server = f"127.0.0.1:{job.PORTS['orchestrator']}"
            out = engine.podman("exec", "orchestrator", "surogate", *command, "--server", server)
            assert steps_shown(out) == [1, 2, 3], out
            assert "succeeded" in out
            for target in reversed(job.SERVICES):
                assert engine.stop(target) == 0, f"{target}: {engine.podman('logs', target)}"
            keys, spans = behind.end()
    finally:
        engine.remove(*reversed(job.SERVICES))
    assert {"run/checkpoint-3/COMPLETE.json", "run/final/adapter_model.safetensors"} <= keys
    steps = [trace for _, name, trace in spans if name == "step"]
    assert len(steps) == 3 == len(set(steps))
    for step in steps:
        assert {service for service, _, trace in spans if trace == step} == {f"surogate-{name}" for name in TARGETS}


@pytest.mark.skipif(bool(NO_KUBECTL), reason=NO_KUBECTL or "kubectl is there")
def test_podman_plays_the_rendered_deployment(engine: Engine, tmp_path: Path) -> None:
    """Environment, user, mounts and locks as the manifests give them, and the services that the probes ask for."""
    shown = cluster("overlays/cpu-kind")
    deployment, config = shown.find("Deployment", "surogate-reward"), shown.find("ConfigMap", "surogate-workers")
    assert deployment is not None and config is not None
    play(engine, tmp_path, "surogate-reward-pod-0", "reward", [config, deployment], deployment["spec"]["template"])


@pytest.mark.parametrize("component", ["trainer", "inference", "reward"])
def test_podman_plays_the_pods_of_a_job(engine: Engine, tmp_path: Path, component: Component) -> None:
    """What the launcher makes of the shipped templates, as a pod of its own: podman knows no Jobs."""
    model = tmp_path / "models" / "model"
    make_tiny_model(model, std=0.1)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    for path in model.iterdir():
        path.chmod(0o644)
    config = resolve_job(job_config("/models/model"))
    made = Manifests("one", "run", config, OrchestratorSettings())
    serving = {"model": "/models/model", "max_model_len": 96}
    spec = WorkerSpec(component, config=serving if component == "inference" else None)
    template = Templates(ROOT / "k8s" / "base" / "pod-templates").load(component)
    owner = Owner("ConfigMap", "v1", "sg-one", "uid")
    pod = made.worker(spec, 1, template, owner)["spec"]["template"]
    # What a kubelet makes of an optional Secret that is not there, and podman 4 does not.
    volumes = [v if "secret" not in v else {"name": v["name"], "emptyDir": {}} for v in pod["spec"]["volumes"]]
    models = {"name": "models", "hostPath": {"path": str(model.parent), "type": "Directory"}}
    pod["spec"]["volumes"] = [*volumes, models]
    pod["spec"]["containers"][0]["volumeMounts"].append({"name": "models", "mountPath": "/models"})
    objects = [made.worker_config(spec, owner)] if spec.config is not None else []
    objects.append(workers_config())
    played = {"apiVersion": "v1", "kind": "Pod", "metadata": {**pod["metadata"], "name": "played"}, "spec": pod["spec"]}
    play(engine, tmp_path, "played", component, [*objects, played], pod)


def workers_config() -> dict[str, Any]:
    """The ConfigMap of the base from which pods have, among others, the address that probes ask."""
    lines = (ROOT / "k8s" / "base" / "workers.env").read_text().splitlines()
    data = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    data["SUROGATE_INFERENCE_KV_CACHE_BYTES"] = str(1 << 26)  # else by the machine's memory
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "surogate-workers"}, "data": data}


UPDATES = "surogate.v1.WeightUpdateService"
CONFIRM = """
import grpc
from surogate.v1 import weights_pb2, weights_pb2_grpc
with grpc.insecure_channel("127.0.0.1:50051") as channel:
    weights_pb2_grpc.WeightUpdateServiceStub(channel).ConfirmWeights(weights_pb2.ConfirmWeightsRequest(), timeout=60)
"""
"""What the orchestrator does before a replica is Ready: it serves the weights that it should, those of the model."""


def play(engine: Engine, folder: Path, pod: str, container: str, objects: list[dict[str, Any]], template: Any) -> None:
    """Plays objects, and asks for what the probes of a container would ask, which podman knows no gRPC for."""
    spec = template["spec"]["containers"][0]
    del spec["ports"]  # podman would publish them, for which there is no network here
    # The cluster gives it to fsGroup, which podman does not know: here it is podman's own.
    spec["volumeMounts"] = [mount for mount in spec["volumeMounts"] if mount["mountPath"] != "/dev/shm"]
    volumes = template["spec"]["volumes"]
    template["spec"]["volumes"] = [volume for volume in volumes if volume["name"] != "shm"]
    file = folder / f"{container}.yaml"
    file.write_text(yaml.safe_dump_all(objects))
    engine.podman("kube", "play", "--network=none", str(file))
    try:
        name = f"{pod}-{container}"
        if container == "inference":
            engine.wait_serving(name, UPDATES, spec["readinessProbe"]["grpc"]["port"], seconds=300)
            engine.python(name, CONFIRM)
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            engine.wait_serving(name, spec[probe]["grpc"]["service"], spec[probe]["grpc"]["port"], seconds=300)
        locked_down(engine, name)
        for path in ("/tmp", "/home/surogate"):
            engine.podman("exec", name, "touch", f"{path}/x")
    finally:
        print(engine.podman("logs", f"{pod}-{container}", check=False))
        engine.podman("kube", "down", str(file))


def test_a_second_build_gives_the_same_layers(engine: Engine, source: Path) -> None:
    image = f"surogate-reward:{VERSION}"
    first = engine.layers(image)
    shutil.rmtree(source / "surogate" / "v1", ignore_errors=True)
    engine.build(source, ["reward"], "--no-cache")
    assert engine.layers(image) == first


def test_the_example_in_python_is_built_and_scores(engine: Engine, source: Path, tmp_path: Path) -> None:
    """With an index of its own: the wheels, as pip's configuration names them."""
    secret = tmp_path / "pip.conf"
    with examples.serving_files(source / "images" / "wheels") as index:
        secret.write_text(f"[global]\nno-index = true\nfind-links = {index}\n")
        given = [f"--secret=id=pip,src={secret}", f"--build-arg=PYTHON_IMAGE={containers.BASE}"]
        examples.build(engine, source, "python", *given)
    assert "vowels" in examples.check_contract(engine, "python", "vowels")


@pytest.mark.skipif(bool(examples.no_node()), reason=examples.no_node() or "node is there")
def test_the_example_in_typescript_is_built_and_scores(engine: Engine, source: Path) -> None:
    examples.make_node_base(engine)
    given = f"--build-arg=NODE_IMAGE={examples.NODE_BASE}"
    said = examples.build(engine, source, "typescript", given, check=False)
    if not engine.has_image("vowel-reward-typescript") and any(word in said for word in examples.NO_REGISTRY):
        pytest.skip("npm reaches no registry")
    assert engine.has_image("vowel-reward-typescript"), said
    assert "vowels" in examples.check_contract(engine, "typescript", "vowels")
