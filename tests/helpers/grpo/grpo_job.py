"""A GRPO job on fakes: its store, its workers, its settings, and what its ledger says afterwards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc.aio
from sqlalchemy import select, update

from orchestrator_svc.create_tables import create_tables
from orchestrator_svc.grpo.configured.plan import Plan
from orchestrator_svc.grpo.configured.sampling import Sampling, TemperatureSchedule
from orchestrator_svc.grpo.configured.settings import EnvironmentSpec, Settings
from orchestrator_svc.grpo.job import run_with
from orchestrator_svc.grpo.ledger import draws, steps
from orchestrator_svc.jobs.context import JobContext
from orchestrator_svc.jobstore import store
from orchestrator_svc.jobstore.database import Database
from orchestrator_svc.jobstore.journal import read_events
from orchestrator_svc.jobstore.schema import jobs
from orchestrator_svc.launchers.base import Component, Worker, WorkerPool, WorkerSpec
from surogate.config.job import resolve_job
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.v1 import job_pb2
from tests.helpers.grpo.grpo_fakes import Fakes, serving_fakes

OWNER = "test"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>"


class FakeWorker(Worker):
    """A worker at a fixed address; the test says when it is another incarnation."""

    def __init__(self, component: Component, index: int, address: str) -> None:
        super().__init__(component, index)
        self.number = 1
        self._address = address
        self._channel = open_channel(address, ClientSecurity())

    @property
    def address(self) -> str:
        return self._address

    @property
    def security(self) -> ClientSecurity:
        return ClientSecurity()

    @property
    def generation(self) -> int:
        return self.number

    @property
    def restarts(self) -> int:
        return self.number - 1

    async def channel(self) -> grpc.aio.Channel:
        return self._channel

    async def ready(self, timeout: float = 900.0) -> int:
        return self.number

    async def close(self) -> None:
        await self._channel.close(None)


class FakePool(WorkerPool):
    """Workers at the fakes' addresses."""

    def __init__(self, fakes: Fakes) -> None:
        self._addresses = fakes.addresses
        self._workers: list[FakeWorker] = []

    @property
    def workers(self) -> Sequence[FakeWorker]:
        return self._workers

    def count(self, component: Component, wanted: int) -> int:
        return len(self._addresses[component])

    async def start(self, spec: WorkerSpec) -> Worker:
        worker = FakeWorker(spec.component, spec.index, self._addresses[spec.component][spec.index])
        self._workers.append(worker)
        return worker

    async def stop(self) -> None:
        for worker in self._workers:
            await worker.close()


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer and a chat template, as a model folder has them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return folder


def job_config(model: str, **orch: Any) -> dict[str, Any]:
    """The configuration of a job on the fake environment, as its YAML files have it."""
    keys = {"env": [{"id": "fake"}], "batch_size": 8, "rollouts_per_example": 4, "max_steps": 4, "seq_len": 128}
    return {"kind": "grpo", "train": {"model": model}, "infer": {}, "orch": {**keys, **orch}}


def settings_for(model: Path, *, evaluate: int = 0, item_timeout: float = 30.0, **plan: Any) -> Settings:
    """4 steps of 2 groups of 4 rollouts, on the fake environment."""
    values: dict[str, Any] = {
        "max_steps": 4,
        "groups_per_step": 2,
        "rollouts_per_example": 4,
        "context": 128,
        "sampling": Sampling(seed=7, schedule=TemperatureSchedule(0.8, 0.8), max_tokens=8),
        "max_async_level": 0,
        "refill_rounds": 0,
        "evaluation_interval": evaluate,
        "seed": 7,
    }
    spec = EnvironmentSpec("fake", "fake", "orch.env.0", timeout=item_timeout)
    if evaluate:
        spec = replace(spec, held_out=0)
    return Settings(str(model), Plan(**{**values, **plan}), [spec], train={"model": str(model)}, timeout=60.0)


@dataclass(frozen=True)
class DrawRow:
    """A draw as the ledger has it."""

    ordinal: int
    step: int
    prompt: str
    state: str
    cause: str
    oldest_version: int | None
    newest_version: int | None


Rows = list[tuple[int, list[tuple[str, int | None]]]]
"""Step → prompts, each with the policy version that answered it."""


class GrpoJob:
    """One job in a store of its own; `run` it as often as orchestrators come and go."""

    def __init__(self, folder: Path, fakes: Fakes, settings: Settings, store_url: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.fakes = fakes
        self.settings = settings
        self.database = Database.open(store_url or f"sqlite:///{folder}/jobs.db")
        self.ctx: JobContext | None = None
        self.pool: FakePool | None = None

    async def create(self) -> None:
        """Stores the job."""
        new = store.NewJob("job", 3, {}, [], {}, str(self.folder), "", "")

        def work(connection: Any) -> None:
            create_tables(connection)
            store.create(connection, new, 10)
            connection.execute(update(jobs).values(owner=OWNER))

        await self.database.write(work)

    async def run(self) -> None:
        """One orchestrator's run of the job."""
        row = await self.database.read(lambda c: store.get(c, "job"))
        self.ctx = JobContext(
            job_id="job",
            config=resolve_job(job_config(self.settings.model)),
            output_dir=self.folder,
            database=self.database,
            owner=OWNER,
            state=row.runner_state,
        )
        self.pool = FakePool(self.fakes)
        try:
            await run_with(self.ctx, self.pool, self.settings)
        finally:
            await self.pool.stop()

    async def draws(self) -> list[DrawRow]:
        """All draws, by ordinal."""
        columns = [draws.c[name] for name in DrawRow.__dataclass_fields__]
        query = select(*columns).order_by(draws.c.ordinal)
        return await self.database.read(lambda c: [DrawRow(*row) for row in c.execute(query)])

    async def rows(self) -> Rows:
        """Step → prompts and the policy version that answered them, of what was trained."""
        trained = [row for row in await self.draws() if row.state == "trained"]
        return [
            (step, [(row.prompt, row.oldest_version) for row in trained if row.step == step])
            for step in sorted({row.step for row in trained})
        ]

    async def step_states(self) -> list[tuple[int, str, bool]]:
        """(step, state, whether its samples are still kept)."""
        query = select(steps.c.step, steps.c.state, steps.c.samples.is_not(None)).order_by(steps.c.step)
        return await self.database.read(lambda c: [tuple(row) for row in c.execute(query)])

    async def events(self) -> list[job_pb2.JobEvent]:
        """The job's history."""
        return await self.database.read(lambda c: read_events(c, "job", 0, 10_000))

    async def close(self) -> None:
        """Closes the store."""
        await self.database.close()


@asynccontextmanager
async def grpo_job(folder: Path, *, replicas: int = 1, **plan: Any) -> AsyncIterator[tuple[GrpoJob, Fakes]]:
    """A job that is stored and not run yet, and the services it will use."""
    async with serving_fakes(replicas) as fakes:
        settings = settings_for(write_tokenizer(folder / "model"), **plan)
        job = GrpoJob(folder / "job", fakes, settings)
        await job.create()
        try:
            yield job, fakes
        finally:
            await job.close()


async def run_killed_at(job: GrpoJob, fakes: Fakes, call: int) -> bool:
    """Runs the job and kills the run as the services get their n-th call; whether that happened."""
    task = asyncio.create_task(job.run())
    reached = asyncio.Event()

    async def kill(_: str) -> None:
        if fakes.hooks.total == call:
            task.cancel()
            reached.set()
            await asyncio.sleep(0.01)  # the call goes on for a while when its caller is dead

    fakes.hooks.each = kill
    try:
        await task
    except asyncio.CancelledError:
        assert reached.is_set()
    fakes.hooks.each = None
    return reached.is_set()
