"""Seconds per GRPO step, by phase, against TRL's GRPOTrainer on the same model, prompts, group and batch.

Both train a LoRA adapter in float32, on-policy, with rewards that cost nothing; ours as a job of the real services that
the local launcher starts, TRL in a process of its own with its own generation. They run one after the other, by turns.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surogate.client.aio import AsyncClient
from surogate.process import start_service
from surogate.v1 import job_pb2
from tests.bench.programs import last_line
from tests.bench.table import Cell, Options, Table
from tests.bench.trl_grpo import LEARNING_RATE, LORA_ALPHA, LORA_RANK, TARGETS
from tests.helpers.models.tiny import make_tiny_model

PHASES = ("time/step", "time/generate", "time/train", "time/push")
WARM_STEPS = 1
GROUP = 8
TRL_SECONDS = 3600.0


@dataclass(frozen=True)
class Case:
    """TRL in one row, and ours in one for each async level."""

    layers: int
    hidden: int
    batch: int
    """Rollouts of a step."""
    tokens: int
    """Most tokens of a completion; a model that was not trained rarely ends earlier."""
    steps: int
    """Steps of a round, of which WARM_STEPS do not count."""
    aim: float
    """TRL's seconds over ours."""
    levels: tuple[int, ...] = (0, 1)

    def config(self, model: Path, reward: str, level: int) -> dict[str, Any]:
        """The job, as its YAML files have it."""
        context = 48 + self.tokens
        lora = {"lora": True, "lora_rank": LORA_RANK, "lora_alpha": LORA_ALPHA, "lora_target_modules": TARGETS}
        train = {
            "model": str(model),
            "sequence_len": context,
            "per_device_train_batch_size": self.batch,  # one micro-batch, as TRL has it
            "torch_dtype": "float32",
            "optimizer": "adamw",
            "recompute": False,
            "learning_rate": LEARNING_RATE,
            "save_steps": 10_000,
            **lora,
        }
        infer = {"max_model_len": context, "dtype": "float32", "max_lora_rank": LORA_RANK, "enforce_eager": True}
        orch = {
            "env": [{"id": "parity", "address": reward}],
            "batch_size": self.batch,
            "rollouts_per_example": GROUP,
            "seq_len": context,
            "max_steps": self.steps,
            "max_async_level": level,
            "sampling": {"max_tokens": self.tokens},
        }
        return {"kind": "grpo", "train": train, "infer": infer, "orch": orch}


QUICK = Case(layers=2, hidden=64, batch=16, tokens=4, steps=2, aim=1.0, levels=(0,))


async def compare(case: Case, options: Options) -> Table:
    """Medians over the steps of all rounds."""
    rows = await _rows(QUICK, 1) if options.quick else await _rows(case, options.rounds or 2)
    columns = ("parameters", "rollouts", "tokens", "system", "s/step", "generate", "train", "push", "TRL / ours", "aim")
    return Table(columns, rows)


async def _rows(case: Case, rounds: int) -> list[list[Cell]]:
    trl: list[float] = []
    ours: dict[int, defaultdict[str, list[float]]] = {level: defaultdict(list) for level in case.levels}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_tiny_model(folder / "model", layers=case.layers, hidden=case.hidden).num_parameters()
        for _ in range(rounds):
            trl += (await _trl(case, folder / "model"))[WARM_STEPS:]
            for level, phases in ours.items():
                for step in (await _ours(case, folder, level))[WARM_STEPS:]:
                    for phase in PHASES:
                        phases[phase].append(step[phase])
    facts: list[Cell] = [size, case.batch, case.tokens]
    typical = statistics.median(trl)
    rows: list[list[Cell]] = [[*facts, "TRL", typical, None, None, None, None, None]]
    for level, phases in ours.items():
        medians = [statistics.median(phases[phase]) for phase in PHASES]
        rows.append([*facts, f"Surogate, async {level}", *medians, typical / medians[0], case.aim])
    return rows


async def _trl(case: Case, model: Path) -> list[float]:
    numbers = {"batch": case.batch, "group": GROUP, "tokens": case.tokens, "steps": case.steps}
    flags = [part for name, value in numbers.items() for part in (f"--{name}", str(value))]
    seconds: list[float] = json.loads(await last_line("tests.bench.trl_grpo", str(model), *flags, seconds=TRL_SECONDS))
    return seconds


async def _ours(case: Case, folder: Path, level: int) -> list[Mapping[str, float]]:
    """Metrics of each step."""
    flags = ["--store-url", f"sqlite:///{folder}/jobs.db", "--output-root", str(folder)]
    reward = await start_service("tests.bench.instant", log_file=folder / "reward.log")
    try:
        orchestrator = await start_service("orchestrator_svc", flags, log_file=folder / "orchestrator.log")
        try:
            async with AsyncClient(orchestrator.address) as client:
                job = await client.create_job(case.config(folder / "model", reward.address, level))
                events = [event async for event in client.watch(job)]
                job = await client.get_job(job)
        finally:
            await orchestrator.stop(grace=60.0)
    finally:
        await reward.stop()
    assert job.state == job_pb2.Job.STATE_SUCCEEDED, job.error.message
    return [dict(event.step_completed.metrics) for event in events if event.HasField("step_completed")]
