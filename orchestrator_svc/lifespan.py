"""Putting the orchestrator together and taking it apart."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

from orchestrator_svc.create_tables import create_tables
from orchestrator_svc.jobs import training_job
from orchestrator_svc.jobs.context import JobContext
from orchestrator_svc.jobs.job_life import RunJob
from orchestrator_svc.jobs.runner import JobRunner
from orchestrator_svc.jobstore.bell import Bell
from orchestrator_svc.jobstore.database import Database
from orchestrator_svc.launchers import make_launcher
from orchestrator_svc.launchers.base import WorkerPool
from orchestrator_svc.service import SERVICE, JobServicer
from orchestrator_svc.settings import OrchestratorSettings
from surogate.rpc.server import RpcServer
from surogate.v1 import job_pb2_grpc


async def _run_grpo(ctx: JobContext, pool: WorkerPool, *, rollout_bytes: int) -> None:
    # Imported with the first such job: its tokenizers and templates would slow down every start.
    from orchestrator_svc.grpo import job

    await job.run(ctx, pool, rollout_bytes=rollout_bytes)


def _runs(settings: OrchestratorSettings) -> Mapping[str, RunJob]:
    grpo = partial(_run_grpo, rollout_bytes=settings.rollout_store_bytes)
    return {"pt": training_job.run, "sft": training_job.run, "grpo": grpo}


@asynccontextmanager
async def _training_jobs(
    settings: OrchestratorSettings, database: Database, servicer: JobServicer
) -> AsyncIterator[None]:
    """Follows the TrainingJobs of the cluster, if that is asked for."""
    if not settings.training_jobs:
        yield
        return
    from orchestrator_svc.launchers.kubernetes.api import Api
    from orchestrator_svc.trainingjobs.reconciler import Reconciler

    api = Api(settings.namespace, kubeconfig=settings.kubeconfig, patience=10.0)
    reconciler = Reconciler(settings, api, database, servicer)
    await reconciler.start()
    try:
        yield
    finally:
        await reconciler.close()


@asynccontextmanager
async def lifespan(server: RpcServer, settings: OrchestratorSettings) -> AsyncIterator[None]:
    """Opens the store, takes up the jobs in it, and answers JobService; leaves running jobs to be gone on with."""
    database = Database.open(settings.store_url)
    try:
        await database.write(create_tables)
        bell = Bell()
        launcher = make_launcher(settings)
        await launcher.prepare()
        runner = JobRunner(settings, database, launcher, _runs(settings), bell)
        servicer = JobServicer(settings, database, runner, bell)
        server.add(job_pb2_grpc.add_JobServiceServicer_to_server, servicer, SERVICE)
        async with _training_jobs(settings, database, servicer):
            runner.start()
            try:
                yield
            finally:
                await runner.stop()
                await launcher.close()
    finally:
        await database.close()
