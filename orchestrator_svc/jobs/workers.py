"""Which workers a job needs, and starting them all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator_svc.launchers.base import Component, Worker, WorkerPool, WorkerSpec

if TYPE_CHECKING:
    from orchestrator_svc.jobs.context import JobContext
    from surogate.config.orch import OrchConfig


@dataclass(frozen=True)
class JobWorkers:
    """The workers of one job, started, perhaps not ready yet."""

    trainer: Worker
    inference: list[Worker]
    """One per replica; empty for PT and SFT."""
    rewards: Mapping[str, Worker]
    """Reward services by their images, `""` for the built-in one; empty when every environment has an address."""


async def start_workers(ctx: JobContext, pool: WorkerPool, replicas: int | None = None) -> JobWorkers:
    """Starts every worker that the job needs, concurrently. Await `ready()` on each before use.

    `replicas` are the inference replicas to start, where that is not what the job was made with.
    """
    specs = worker_specs(ctx, pool, replicas)
    workers = await asyncio.gather(*(pool.start(spec) for spec in specs))
    by_component: dict[Component, list[Worker]] = {"trainer": [], "inference": [], "reward": []}
    for worker in workers:
        by_component[worker.component].append(worker)
    return JobWorkers(
        trainer=by_component["trainer"][0],
        inference=by_component["inference"],
        rewards={spec.image: worker for spec, worker in zip(specs, workers, strict=True) if spec.component == "reward"},
    )


async def start_replica(ctx: JobContext, pool: WorkerPool, index: int) -> Worker:
    """Starts one more replica."""
    specs = worker_specs(ctx, pool, index + 1)
    return await pool.start(next(spec for spec in specs if (spec.component, spec.index) == ("inference", index)))


def worker_specs(ctx: JobContext, pool: WorkerPool, replicas: int | None = None) -> list[WorkerSpec]:
    """What to start: a trainer; for GRPO also the inference replicas, and the built-in reward service if some
    environment of the job has no address of its own. Inference comes first: it takes longest to load."""
    job = ctx.config
    trainer = WorkerSpec("trainer")
    if job.kind != "grpo":
        return [trainer]
    infer = job.infer
    count = pool.count("inference", replicas or infer.dp)
    # Replica i listens at port + i where the user chose a port; the default is for one that a person starts alone.
    chosen = infer.port not in (0, type(infer).model_fields["port"].default)
    payload = infer.model_dump(mode="json")
    specs = [
        WorkerSpec(
            "inference",
            index,
            config=payload,
            host=infer.host or "127.0.0.1",
            port=infer.port + index if chosen else 0,
            port_key="infer.port",
        )
        for index in range(count)
    ]
    specs.append(trainer)
    own, images = _own_services(job.orch)
    if own:
        specs.append(WorkerSpec("reward"))
    specs += [WorkerSpec("reward", index, image=image) for index, image in enumerate(images, 1)]
    return specs


def _own_services(orch: OrchConfig) -> tuple[bool, list[str]]:
    """Whether a judge or some environment has the built-in service, and the images of the others without an address.

    One that is evaluated on, and says no more than the id of one that is trained on, has the service of that one.
    """
    trained = {(env.id, name) for env in orch.env for name in (None, env.name)}
    evaluated = orch.eval.env if orch.eval else []
    own = [env for env in evaluated if env.args or env.image or (env.id, env.name) not in trained]
    without = [env for env in [*orch.env, *own] if env.address is None]
    images = dict.fromkeys(env.image for env in without if env.image)
    return orch.ruler.enabled or any(env.image is None for env in without), list(images)
