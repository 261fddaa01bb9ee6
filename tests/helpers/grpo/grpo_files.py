"""A small GRPO job as a user writes it down, and what its ledger says."""

from __future__ import annotations

import json
import sqlite3
import string
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rows = list[tuple[int, list[tuple[str, int]]]]
"""Step → prompts, each with the policy version that answered it."""

Keys = Mapping[str, Any]


def write_grpo_files(
    folder: Path, *, train: Keys | None = None, infer: Keys | None = None, orch: Keys | None = None
) -> list[str]:
    """Writes train.yaml, infer.yaml and orch.yaml for the model in `folder`/model; returns the command's arguments.

    Strictly on-policy and without refill: 4 groups of 4 rollouts of reverse-text a step, 8 steps, a checkpoint every 3.
    """
    texts = {"alphabet": string.ascii_lowercase, "min_chars": 16, "max_chars": 32}
    parts: dict[str, dict[str, Any]] = {
        "train": {
            "model": "./model",
            "output_dir": "out",
            "torch_dtype": "float32",
            "sequence_len": 96,
            "per_device_train_batch_size": 4,
            "max_steps": 8,
            "save_steps": 3,
            "optimizer": "adamw",
            "learning_rate": 5e-3,
            "lora": True,
            "lora_rank": 8,
            "lora_alpha": 16,
            "loss": {"type": "ipo"},
            **(train or {}),
        },
        "infer": {"max_num_seqs": 16, "max_lora_rank": 8, **(infer or {})},
        "orch": {
            "env": [{"id": "reverse-text", "args": texts}],
            "batch_size": 16,
            "rollouts_per_example": 4,
            "max_async_level": 0,
            "refill_rounds": 0,
            "sampling": {"max_tokens": 24, "temperature": 0.7},
            **(orch or {}),
        },
    }
    for name, keys in parts.items():
        (folder / f"{name}.yaml").write_text(json.dumps(keys, indent=1))  # JSON is YAML
    return ["grpo", *(part for name in parts for part in (f"--{name}", f"{name}.yaml"))]


@dataclass(frozen=True)
class Ledger:
    """The store of a job, read from outside while the job runs."""

    path: Path

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        """Rows of a query; none while there is no such table."""
        if not self.path.exists():
            return []
        with closing(sqlite3.connect(self.path, timeout=30)) as connection:
            try:
                return list(connection.execute(query))
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):
                    return []
                raise

    def rows(self) -> Rows:
        """What was generated for each step, whether it was good to train on or not."""
        found: dict[int, list[tuple[str, int]]] = {}
        query = "SELECT step, prompt, oldest_version FROM grpo_draws ORDER BY ordinal"
        for step, prompt, version in self.ask(query):
            found.setdefault(step, []).append((prompt, version))
        return sorted(found.items())

    def generates(self, step: int) -> bool:
        """Whether prompts of a step were drawn whose rollouts are not all there."""
        return bool(self.ask(f"SELECT 1 FROM grpo_draws WHERE step = {step} AND state = 'drawn'"))

    def trains(self, step: int) -> bool:
        """Whether a step's samples are with the trainer."""
        return self.ask(f"SELECT state FROM grpo_steps WHERE step = {step}") == [("prepared",)]

    def keep_samples(self) -> bool:
        """Has the store keep a copy of the samples of every step, for `kept_samples`; whether it could be done yet."""
        if not self.ask("SELECT 1 FROM sqlite_master WHERE name = 'grpo_steps'"):
            return False
        with closing(sqlite3.connect(self.path, timeout=30)) as connection, connection:
            connection.execute("CREATE TABLE kept_samples (step INTEGER, samples BLOB)")
            connection.execute(
                "CREATE TRIGGER keep_samples AFTER INSERT ON grpo_steps BEGIN "
                "INSERT INTO kept_samples VALUES (NEW.step, NEW.samples); END"
            )
        return True

    def kept_samples(self) -> dict[int, bytes]:
        """Samples of every step, as the ledger had them."""
        return dict(self.ask("SELECT step, samples FROM kept_samples ORDER BY step"))
