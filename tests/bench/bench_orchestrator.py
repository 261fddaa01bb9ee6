"""Rollouts a second through the whole orchestrator, when generating, scoring, training and pushing take no time.

The orchestrator is the real service in a process of its own, with its store, ledger, events and metrics.jsonl, on
workers at given addresses; trainer and replica are `tests.bench.instant`, and so is the reward service, except where a
row says that the real one scores.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surogate.client.aio import AsyncClient
from surogate.process import ServiceProcess, start_service
from surogate.v1 import job_pb2
from tests.bench.table import Options, Table
from tests.helpers.grpo.grpo_job import write_tokenizer

AIM = 2000.0
"""Rollouts a second."""

GROUP = 8
WARM_STEPS = 3


@dataclass(frozen=True)
class Case:
    """One row."""

    batch: int
    """Rollouts of a step."""
    tokens: int
    async_level: int = 1
    reward: str = "instant"

    def config(self, model: Path, steps: int) -> dict[str, Any]:
        """The job, as its YAML files have it."""
        orch = {
            "env": [{"id": "reverse-text"}],
            "batch_size": self.batch,
            "rollouts_per_example": GROUP,
            "seq_len": 1024,
            "max_steps": steps,
            "max_async_level": self.async_level,
            "sampling": {"max_tokens": self.tokens},
        }
        return {"kind": "grpo", "train": {"model": str(model), "save_steps": 10_000}, "infer": {}, "orch": orch}


CASES = (
    Case(128, 16, async_level=0),
    Case(128, 16),
    Case(1024, 16),
    Case(1024, 16, reward="built-in"),
    Case(1024, 128),
)


async def run(options: Options) -> Table:
    """Rollouts a second, the median over the rounds, each of them a job."""
    steps, cases = (WARM_STEPS + 2, (Case(16, 4), Case(16, 4, reward="built-in"))) if options.quick else (33, CASES)
    rounds = options.rounds or (1 if options.quick else 3)
    rates: dict[Case, list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            rates[case].append(await _rate(case, steps))
    return Table(
        ("rollouts a step", "tokens each", "async level", "reward service", "rollouts/s", "aim"),
        [
            (case.batch, case.tokens, case.async_level, case.reward, statistics.median(rates[case]), AIM)
            for case in cases
        ],
    )


async def _rate(case: Case, steps: int) -> float:
    return case.batch / await step_seconds(case, steps)


async def step_seconds(
    case: Case, steps: int, workers: str = "tests.bench.instant", environment: Mapping[str, str] | None = None
) -> float:
    """Seconds a step of a job on `workers`, a module that is trainer, inference and reward in one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_tokenizer(folder / "model")
        async with (
            _services(folder, case, workers, environment or {}) as orchestrator,
            AsyncClient(orchestrator.address) as client,
        ):
            job = await client.create_job(case.config(model, steps))
            done = [
                event.time.ToNanoseconds() / 1e9
                async for event in client.watch(job)
                if event.HasField("step_completed")
            ]
            job = await client.get_job(job)
            assert job.state == job_pb2.Job.STATE_SUCCEEDED, job.error.message
    return (done[-1] - done[WARM_STEPS - 1]) / (len(done) - WARM_STEPS)


@asynccontextmanager
async def _services(folder: Path, case: Case, workers: str, extra: Mapping[str, str]) -> AsyncIterator[ServiceProcess]:
    async with AsyncExitStack() as stack:

        async def start(module: str, *arguments: str) -> ServiceProcess:
            environment = {"BENCH_TOKENS": str(case.tokens), **extra}
            log = folder / f"{module}.log"
            service = await start_service(module, arguments, log_file=log, environment=environment)
            stack.push_async_callback(service.stop)
            return service

        instant = await start(workers)
        reward = instant if case.reward == "instant" else await start("reward_svc")
        flags = {
            "launcher": "static",
            "store-url": f"sqlite:///{folder}/jobs.db",
            "output-root": str(folder),
            "trainer-address": instant.address,
            "inference-addresses": json.dumps([instant.address]),
            "reward-address": reward.address,
        }
        yield await start("orchestrator_svc", *[part for name, value in flags.items() for part in (f"--{name}", value)])
