"""The images: really built, without a package index, and run locked down as the manifests have it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.test_wheel import checkout
from tests.helpers import containers
from tests.helpers.containers import VERSION, Engine
from tests.helpers.manifests.shipped import NO_KUBECTL, cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(containers.missing()), reason=containers.missing() or "can be built"),
]
LIGHT = ("orchestrator", "reward")
SERVICES = {"orchestrator": "surogate.v1.JobService", "reward": "surogate.v1.RewardService"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean checkout."""
    return checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Iterator[Engine]:
    """An engine that has built both."""
    engine = Engine(tmp_path_factory.mktemp("containers"))
    try:
        engine.make_base()
        engine.collect_wheels(source, LIGHT)
        engine.build(source, LIGHT)
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize("target", LIGHT)
def test_an_image_serves_without_root_network_or_a_disk_to_write_to(engine: Engine, target: str) -> None:
    state = ["--tmpfs=/var/lib/surogate:mode=0700,U"] if target == "orchestrator" else []
    engine.start(target, f"surogate-{target}:{VERSION}", flags=state)
    engine.wait_serving(target, SERVICES[target])
    status = engine.podman("exec", target, "cat", "/proc/1/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Name"] == "tini"
    assert fields["Uid"].split()[0] == "10001"
    assert set(fields["CapEff"]) == {"0"} == set(fields["CapBnd"])
    assert fields["NoNewPrivs"] == "1"
    assert "Read-only file system" in engine.podman("exec", target, "touch", "/opt/surogate/x", check=False)
    assert engine.podman("exec", target, "id", "--user", "--name") == "surogate"
    assert engine.stop(target) == 0
    assert '"event": "stopped"' in engine.podman("logs", target), "SIGTERM reaches the service through tini"


def test_the_reward_image_scores(engine: Engine) -> None:
    engine.start("scorer", f"surogate-reward:{VERSION}")
    engine.wait_serving("scorer", SERVICES["reward"])
    program = (
        "import grpc\n"
        "from surogate.v1 import reward_pb2, reward_pb2_grpc\n"
        "stub = reward_pb2_grpc.RewardServiceStub(grpc.insecure_channel('127.0.0.1:50051'))\n"
        "found = stub.ListEnvironments(reward_pb2.ListEnvironmentsRequest(), timeout=20)\n"
        "print(*(environment.id for environment in found.environments))\n"
    )
    assert "reverse-text" in engine.python("scorer", program).split()
    engine.podman("exec", "scorer", "bwrap", "--version")


@pytest.mark.parametrize("target", LIGHT)
def test_an_image_says_what_it_is_and_carries_no_torch(engine: Engine, target: str) -> None:
    found = json.loads(engine.podman("inspect", f"surogate-{target}:{VERSION}"))[0]
    assert found["Config"]["User"] == "10001:10001"
    assert found["Config"]["Entrypoint"][:2] == ["tini", "--"]
    labels = found["Labels"]
    assert labels["org.opencontainers.image.title"] == f"surogate-{target}"
    assert labels["org.opencontainers.image.version"] == VERSION
    assert found["Created"].startswith("2023-11-14"), "SOURCE_DATE_EPOCH, not the clock"
    listing = "import os; print(*os.listdir('/opt/surogate/lib/python3.11/site-packages'))"
    run = ["run", "--rm", "--network=none", "--entrypoint=python", f"surogate-{target}:{VERSION}", "-c", listing]
    packages = set(engine.podman(*run).split())
    assert "orchestrator_svc" in packages
    assert not packages & {"torch", "vllm", "transformers", "pip", "grpc_tools"}


@pytest.mark.skipif(bool(NO_KUBECTL), reason=NO_KUBECTL or "kubectl is there")
def test_podman_plays_the_rendered_deployment(engine: Engine, tmp_path: Path) -> None:
    """Environment, user, mounts and locks as the manifests give them, and the services that the probes ask for."""
    shown = cluster("overlays/cpu-kind")
    deployment, config = shown.find("Deployment", "surogate-reward"), shown.find("ConfigMap", "surogate-workers")
    assert deployment is not None and config is not None
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    del container["ports"]  # podman would publish them, for which there is no network here
    file = tmp_path / "reward.yaml"
    file.write_text(yaml.safe_dump_all([config, deployment]))
    engine.podman("kube", "play", "--network=none", str(file))
    try:
        name = "surogate-reward-pod-0-reward"
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            engine.wait_serving(name, container[probe]["grpc"]["service"], container[probe]["grpc"]["port"])
        assert engine.podman("exec", name, "id", "--user") == "10001"
        assert "Read-only file system" in engine.podman("exec", name, "touch", "/opt/x", check=False)
        for path in (
            "/tmp",
            "/home/surogate",
        ):  # /dev/shm is the cluster's to give to fsGroup, which podman does not know
            engine.podman("exec", name, "touch", f"{path}/x")
    finally:
        engine.podman("kube", "down", str(file))


def test_a_second_build_gives_the_same_layers(engine: Engine, source: Path) -> None:
    image = f"surogate-reward:{VERSION}"

    def layers() -> list[str]:
        return json.loads(engine.podman("inspect", image))[0]["RootFS"]["Layers"]

    first = layers()
    shutil.rmtree(source / "surogate" / "v1", ignore_errors=True)
    engine.build(source, ["reward"], "--no-cache")
    assert layers() == first
