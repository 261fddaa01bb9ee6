"""Workers as child processes of the orchestrator, on the same machine."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from orchestrator_svc.launchers.base import Component, Job, Launcher, Worker, WorkerPool, WorkerSpec
from orchestrator_svc.launchers.child import ChildCommand, ChildWorker
from orchestrator_svc.launchers.gpus import Assignment, assign, visible_devices
from orchestrator_svc.launchers.incarnations import RestartPolicy
from surogate.errors import FailedPreconditionError
from surogate.rpc import address
from surogate.rpc.channel import ClientSecurity

if TYPE_CHECKING:
    from orchestrator_svc.settings import OrchestratorSettings

MODULES: Mapping[Component, str] = {"trainer": "trainer_svc", "inference": "inference_svc", "reward": "reward_svc"}
_DRAIN_SECONDS = "2"
"""When a worker of a job is stopped, nobody waits for its answers any more."""

_EXTRA_STOP_SECONDS: Mapping[Component, float] = {"trainer": 120.0, "inference": 0.0, "reward": 0.0}
"""Beyond the usual time to end: the trainer may be writing a checkpoint."""


class LocalLauncher(Launcher):
    """Starts the services of this installation as child processes that end with the orchestrator, however it ends."""

    def __init__(self, settings: OrchestratorSettings) -> None:
        self._settings = settings

    async def open(self, job: Job) -> WorkerPool:
        return LocalPool(job, self._settings, await visible_devices())

    async def reap(self, job_id: str, uid: str) -> None:
        """Nothing to do: the children of an orchestrator die with it."""


class LocalPool(WorkerPool):
    """The child processes of one job. They share a random token that nobody else knows."""

    def __init__(self, job: Job, settings: OrchestratorSettings, devices: Sequence[str]) -> None:
        self._job = job
        self._settings = settings
        self._devices = devices
        self._security = ClientSecurity(token=secrets.token_urlsafe(32))
        self._workers: list[ChildWorker] = []
        self._logs = job.output_dir / "logs"
        self._policy = RestartPolicy(max_restarts=settings.max_worker_restarts)

    @property
    def workers(self) -> Sequence[Worker]:
        return self._workers

    def count(self, component: Component, wanted: int) -> int:
        return wanted

    async def start(self, spec: WorkerSpec) -> Worker:
        if spec.port:
            _require_free_port(spec)
        command = ChildCommand(
            module=self._settings.worker_modules.get(spec.component, MODULES[spec.component]),
            arguments=self._arguments(spec),
            environment=self._environment(spec),
            listen=address.join(spec.host, spec.port),
            log_file=self._logs / f"{spec.component}-{spec.index}.log",
        )
        stop_seconds = self._settings.worker_stop_seconds + _EXTRA_STOP_SECONDS[spec.component]
        worker = ChildWorker(spec, command, self._security, self._policy, stop_seconds, self._job)
        self._workers.append(worker)
        worker.launch()
        return worker

    async def remove(self, worker: Worker) -> None:
        mine = next(one for one in self._workers if one is worker)
        self._workers.remove(mine)
        await mine.stop()

    async def stop(self) -> None:
        # The trainer first: it may push to replicas until it is told to end.
        trainers = [worker.stop() for worker in self._workers if worker.component == "trainer"]
        await asyncio.gather(*trainers)
        await asyncio.gather(*(worker.stop() for worker in self._workers if worker.component != "trainer"))

    def _arguments(self, spec: WorkerSpec) -> list[str]:
        arguments = ["--drain-seconds", _DRAIN_SECONDS, "--log-format", "json"]
        if spec.config is None:
            return arguments
        self._logs.mkdir(parents=True, exist_ok=True)
        file = self._logs / f"{spec.component}-{spec.index}.config.json"
        file.write_text(json.dumps(spec.config, indent=2), encoding="utf-8")
        return [*arguments, "--config", str(file)]

    def _environment(self, spec: WorkerSpec) -> dict[str, str]:
        environment = {"OMP_NUM_THREADS": str(threads(spec.component, self._replicas()))}
        environment = {key: value for key, value in environment.items() if key not in os.environ}
        if self._devices and spec.component != "reward":
            shares = self._shares()
            mine = (
                shares.trainer if spec.component == "trainer" else shares.inference[spec.index % len(shares.inference)]
            )
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        return environment

    def _shares(self) -> Assignment:
        job = self._job.config
        tp = job.infer.tp if job.kind == "grpo" else 1
        return assign(self._devices, job.train.gpus, self._replicas(), tp)

    def _replicas(self) -> int:
        job = self._job.config
        return job.infer.dp if job.kind == "grpo" else 0


def threads(component: Component, replicas: int, cores: Callable[[], int] | None = None) -> int:
    """CPU threads for a worker. Training and generation mostly alternate, so each gets all cores; replicas, which
    generate at the same time, share them."""
    available = (cores or _cores)()
    match component:
        case "trainer":
            return available
        case "inference":
            return max(1, available // max(1, replicas))
    return 1


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _require_free_port(spec: WorkerSpec) -> None:
    with socket.socket(socket.AF_INET6 if ":" in spec.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((spec.host, spec.port))
        except OSError as error:
            raise FailedPreconditionError(
                f"{spec.port_key}: {spec.component} replica {spec.index} cannot listen on "
                f"{address.join(spec.host, spec.port)} ({error.strerror}): leave the key out, or choose another",
                reason="PORT_TAKEN",
            ) from error
