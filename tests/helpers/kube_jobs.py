"""Jobs on the fake cluster: the launcher's settings, pods that serve the fakes, and an orchestrator that uses them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from surogate.rpc.server import RpcServer
from surogate.v1 import trainer_pb2_grpc
from tests.helpers import fake_trainer
from tests.helpers.kube import Cluster, kubernetes, write_kubeconfig, write_templates
from tests.helpers.kube_server import Object
from tests.helpers.orchestrator import Orchestrator, orchestrating


class TrainerPods:
    """Each pod is a fake trainer of its own; `step_seconds` is how long it takes for a step."""

    def __init__(self, step_seconds: float = 0.0) -> None:
        self.step_seconds = step_seconds
        self.trainers: list[fake_trainer.FakeTrainer] = []

    def __call__(self, pod: Object, server: RpcServer) -> None:
        trainer = fake_trainer.FakeTrainer(self.step_seconds)
        self.trainers.append(trainer)
        server.add(trainer_pb2_grpc.add_TrainerServiceServicer_to_server, trainer, fake_trainer.SERVICE)


def launcher_settings(folder: Path, cluster: Cluster, **settings: Any) -> dict[str, Any]:
    """Settings of an orchestrator on the cluster."""
    return {
        "kubeconfig": write_kubeconfig(folder / "kubeconfig", cluster.api.url),
        "pod_templates": write_templates(folder / "templates"),
        "api_patience": 20.0,
        **settings,
    }


@asynccontextmanager
async def training_on(
    folder: Path, pods: TrainerPods | None = None, **settings: Any
) -> AsyncIterator[tuple[Orchestrator, Cluster]]:
    """An orchestrator that runs PT and SFT jobs on a cluster of fake trainers."""
    async with kubernetes(pods or TrainerPods()) as cluster:
        values = launcher_settings(folder, cluster, **settings)
        async with orchestrating(folder, launcher_name="kubernetes", **values) as orchestrator:
            yield orchestrator, cluster
