"""Jobs on the fake cluster: the launcher's settings, pods that serve the fakes, and an orchestrator that uses them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator_svc.grpo import job as grpo
from surogate.rpc.server import RpcServer
from surogate.v1 import inference_pb2_grpc, reward_pb2_grpc, trainer_pb2_grpc
from tests.helpers.cluster.kube import PORT, Cluster, kubernetes, write_kubeconfig, write_templates
from tests.helpers.cluster.kube_server import Object
from tests.helpers.grpo import grpo_fakes
from tests.helpers.grpo.grpo_job import write_tokenizer
from tests.helpers.orchestrator import Orchestrator, orchestrating
from tests.helpers.trainer import fake_trainer


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
        "namespace": cluster.api.namespace,
        "pod_templates": write_templates(folder / "templates"),
        "api_patience": 60.0,
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


class GrpoPods:
    """Pods of GRPO jobs: a trainer whose disk survives it, replicas that begin with version 0, and a reward service."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.hooks = grpo_fakes.Hooks()
        self.disk = grpo_fakes.Disk()
        self.replicas: dict[str, grpo_fakes.FakeInference] = {}
        self.trainers: list[grpo_fakes.FakeTrainer] = []
        self.seconds = seconds

    def __call__(self, pod: Object, server: RpcServer) -> None:
        match pod["metadata"]["labels"]["app.kubernetes.io/component"]:
            case "trainer":
                trainer = grpo_fakes.FakeTrainer(self.hooks, self.replicas)
                trainer.disk = self.disk
                self.trainers.append(trainer)
                add: Any = trainer_pb2_grpc.add_TrainerServiceServicer_to_server
                server.add(add, trainer, "surogate.v1.TrainerService")
            case "inference":
                replica = grpo_fakes.FakeInference(self.hooks, self.seconds)
                self.replicas[f"{pod['status']['podIP']}:{PORT}"] = replica
                add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
                server.add(add, replica, "surogate.v1.InferenceService")
                server.set_serving("surogate.v1.WeightUpdateService", True)
            case "reward":
                reward = grpo_fakes.FakeReward(self.hooks)
                add = reward_pb2_grpc.add_RewardServiceServicer_to_server
                server.add(add, reward, "surogate.v1.RewardService")
                add = reward_pb2_grpc.add_EnvironmentServiceServicer_to_server
                server.add(add, reward, "surogate.v1.EnvironmentService")

    def of(self, pod: Object) -> grpo_fakes.FakeInference:
        """The replica in a pod."""
        return self.replicas[f"{pod['status']['podIP']}:{PORT}"]


@asynccontextmanager
async def reinforcing_on(
    folder: Path, pods: GrpoPods, **settings: Any
) -> AsyncIterator[tuple[Orchestrator, Cluster, str]]:
    """An orchestrator that runs GRPO jobs on a cluster of fakes, and the model that they begin with."""
    model = write_tokenizer(folder / "model")
    async with kubernetes(pods) as cluster:
        values = launcher_settings(folder, cluster, **settings)
        runs = {"grpo": partial(grpo.run, rollout_bytes=0)}
        async with orchestrating(folder, runs, launcher_name="kubernetes", **values) as orchestrator:
            yield orchestrator, cluster, str(model)
