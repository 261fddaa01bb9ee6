"""compose.yaml: the four services on one machine, locked down, each with flags that it knows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from inference_svc.settings import InferenceSettings
from orchestrator_svc.settings import OrchestratorSettings
from reward_svc.settings import BuiltInSettings
from surogate.config.service import ServiceSettings, parse_settings
from trainer_svc.settings import TrainerSettings

FILE = Path(__file__).parents[3] / "compose.yaml"
SETTINGS: dict[str, type[ServiceSettings]] = {
    "orchestrator": OrchestratorSettings,
    "trainer": TrainerSettings,
    "inference": InferenceSettings,
    "reward": BuiltInSettings,
}


def interpolated(text: str) -> str:
    """With the defaults of its variables, and a model."""
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", text)
    return re.sub(r"\$\{(\w+):\?[^}]*\}", "/models/tiny", text)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(interpolated(FILE.read_text(encoding="utf-8")))
    return found


def test_the_services_take_their_flags(document: dict[str, Any]) -> None:
    services = document["services"]
    assert services.keys() == SETTINGS.keys()
    for name, service in services.items():
        assert service["image"] == f"surogate-{name}:0.1.0"
        settings = parse_settings(SETTINGS[name], service.get("command", []))
        assert settings.model_fields_set or not service.get("command")
    orchestrator = parse_settings(OrchestratorSettings, services["orchestrator"]["command"])
    called = [orchestrator.trainer_address, orchestrator.reward_address, *orchestrator.inference_addresses]
    assert called == ["trainer:50051", "reward:50051", "inference:50051"]
    assert orchestrator.input_roots == [Path("/models")], "jobs read what is mounted for them, and what jobs wrote"
    assert str(orchestrator.output_root) in {volume.split(":")[1] for volume in services["trainer"]["volumes"]}


def test_the_services_are_locked_down(document: dict[str, Any]) -> None:
    for name, service in document["services"].items():
        assert service["read_only"] is True, name
        assert service["user"] == "10001:10001"
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service and "cap_add" not in service
        assert service["tmpfs"] == ["/tmp:mode=1777"]
        written = {name: service["environment"][name] for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
        assert all(path == "/tmp" or path.startswith("/tmp/") for path in written.values()), written
    assert document["services"]["reward"]["networks"] == ["services"]
    assert document["networks"]["services"]["internal"] is True


def test_what_is_mounted_and_joined_is_declared(document: dict[str, Any]) -> None:
    for service in document["services"].values():
        assert set(service["networks"]) <= document["networks"].keys()
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source.startswith("./") or source in document["volumes"]


def test_ports_are_open_to_this_machine_alone(document: dict[str, Any]) -> None:
    ports = [port for service in document["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def compose() -> list[str]:
    """A program that reads compose files; empty where there is none."""
    if shutil.which("docker"):
        ran = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False, timeout=180)
        if ran.returncode == 0:
            return ["docker", "compose"]
    found = shutil.which("docker-compose") or shutil.which("podman-compose")
    return [found] if found else []


@pytest.mark.skipif(not compose(), reason="needs docker compose, docker-compose or podman-compose")
def test_compose_reads_it() -> None:
    command = [*compose(), "--file", str(FILE), "config"]
    environment = os.environ | {"MODEL": "/models/tiny"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert set(yaml.safe_load(ran.stdout)["services"]) == SETTINGS.keys()
