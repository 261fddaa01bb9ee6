"""An orchestrator in the test's own process, with whatever launcher the test wants, and short ways to talk to it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from orchestrator_svc.create_tables import create_tables
from orchestrator_svc.jobs import training_job
from orchestrator_svc.jobs.job_life import RunJob
from orchestrator_svc.jobs.runner import JobRunner
from orchestrator_svc.jobstore.bell import Bell
from orchestrator_svc.jobstore.database import Database
from orchestrator_svc.launchers import make_launcher
from orchestrator_svc.launchers.base import Launcher
from orchestrator_svc.service import SERVICE, JobServicer
from orchestrator_svc.settings import OrchestratorSettings
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.v1 import job_pb2, job_pb2_grpc
from tests.helpers.rpc import serving
from tests.helpers.trainer import fake_trainer

State = job_pb2.Job
ENDED = (State.STATE_SUCCEEDED, State.STATE_FAILED, State.STATE_CANCELLED)
TRAINING_RUNS: Mapping[str, RunJob] = {"pt": training_job.run, "sft": training_job.run}


class Orchestrator:
    """A client of the orchestrator under test."""

    def __init__(
        self,
        stub: job_pb2_grpc.JobServiceAsyncStub,
        folder: Path,
        runner: JobRunner | None = None,
        address: str = "",
        servicer: JobServicer | None = None,
        settings: OrchestratorSettings | None = None,
        database: Database | None = None,
    ) -> None:
        self.stub = stub
        self.address = address
        self.folder = folder
        self.runner = runner
        self.servicer: Any = servicer
        self.settings = settings
        self.database = database

    async def create(self, config: Mapping[str, Any], **fields: Any) -> job_pb2.Job:
        """CreateJob."""
        request = job_pb2.CreateJobRequest(**fields)
        request.config.update(config)
        return await self.stub.CreateJob(request)

    async def get(self, name: str) -> job_pb2.Job:
        """GetJob."""
        return await self.stub.GetJob(job_pb2.GetJobRequest(name=name))

    async def cancel(self, name: str) -> job_pb2.Job:
        """CancelJob."""
        return await self.stub.CancelJob(job_pb2.CancelJobRequest(name=name))

    def watch(self, name: str, after: int = 0) -> AsyncIterator[job_pb2.JobEvent]:
        """WatchJob."""
        request = job_pb2.WatchJobRequest(name=name, after_sequence=after)
        return self.stub.WatchJob(request, timeout=120)  # type: ignore[return-value]

    async def history(self, name: str) -> list[job_pb2.JobEvent]:
        """All events, to the job's end."""
        return [event async for event in self.watch(name)]

    async def ended(self, name: str) -> job_pb2.Job:
        """The job, once it has ended."""
        await self.history(name)
        return await self.get(name)

    async def until(self, name: str, *states: job_pb2.Job.State.ValueType) -> None:
        """Watches until the job is, or has been, in one of the states."""
        async for event in self.watch(name):
            if event.HasField("state_changed") and event.state_changed.state in states:
                return
        raise AssertionError(f"{name} ended otherwise: {(await self.get(name)).status_message}")

    async def until_step(self, name: str, step: int) -> None:
        """Watches until a step was done."""
        async for event in self.watch(name):
            if event.step_completed.step >= step:
                return
        raise AssertionError(f"{name} ended before step {step}: {(await self.get(name)).status_message}")


@asynccontextmanager
async def orchestrating(
    folder: Path,
    runs: Mapping[str, RunJob] = TRAINING_RUNS,
    launcher: Launcher | None = None,
    launcher_name: str = "local",
    identity: str | None = None,
    **settings: Any,
) -> AsyncIterator[Orchestrator]:
    """JobService on a free port, on a store in `folder`; jobs write under `folder` too."""
    values: dict[str, Any] = {
        "launcher": launcher_name,
        "store_url": f"sqlite:///{folder}/jobs.db",
        "output_root": folder,
        "lease_seconds": 3.0,
        **settings,
    }
    settings_ = OrchestratorSettings(**values)
    database = Database.open(settings_.store_url)
    await database.write(create_tables)
    bell = Bell()
    launcher = launcher or make_launcher(settings_)
    runner = JobRunner(settings_, database, launcher, runs, bell, identity)
    servicer = JobServicer(settings_, database, runner, bell)

    def register(server: Any) -> None:
        server.add(job_pb2_grpc.add_JobServiceServicer_to_server, servicer, SERVICE)

    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(database.close)
        server = await stack.enter_async_context(serving(register))
        channel = await stack.enter_async_context(open_channel(server.address, ClientSecurity()))
        runner.start()
        stack.push_async_callback(launcher.close)
        stack.push_async_callback(runner.stop)
        stub = job_pb2_grpc.JobServiceStub(channel)
        yield Orchestrator(stub, folder, runner, server.address, servicer, settings_, database)


@asynccontextmanager
async def serving_fake_trainer(step_seconds: float = 0.0) -> AsyncIterator[tuple[str, fake_trainer.FakeTrainer]]:
    """The address of a fake trainer in this process, and the fake."""
    from surogate.v1 import trainer_pb2_grpc

    fake = fake_trainer.FakeTrainer(step_seconds)

    def register(server: Any) -> None:
        server.add(trainer_pb2_grpc.add_TrainerServiceServicer_to_server, fake, fake_trainer.SERVICE)

    async with serving(register) as server:
        yield server.address, fake


def sft_config(model: str = "model", **train: Any) -> dict[str, Any]:
    """An SFT job for the fake trainer."""
    datasets = [{"path": "data.jsonl", "type": "instruction", "instruction_field": "q", "output_field": "a"}]
    keys = {"model": model, "datasets": datasets, "max_steps": 5, "save_steps": 2, "output_dir": "out"}
    return {"kind": "sft", "train": {**keys, **train}}
