"""Every configuration in docs/datasets.md makes tokens of data as the page describes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from surogate.config.job import resolve_job
from surogate.config.load import parse_yaml
from tests.helpers.models.tiny import VOCAB_SIZE, make_tiny_tokenizer
from trainer_svc.worker.data.prepare import prepare

PAGE = Path(__file__).parents[3] / "docs" / "datasets.md"
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)

ALPACA = [{"instruction": f"Twice {n}?", "input": "Be quick." * (n % 2), "output": str(2 * n)} for n in range(20)]
TALK = [
    {"talk": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": f"{n}!"}], "rules": "R"} for n in range(8)
]
CALLS = [
    {
        "messages": [
            {"role": "user", "content": "Now?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock", "arguments": "{}"}}]},
            {"role": "tool", "content": "noon"},
            {"role": "assistant", "content": "It is noon."},
        ],
        "tools": [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}],
    }
] * 4


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    jsonl(folder / "books.jsonl", [{"text": f"Chapter {n}. " * 60} for n in range(20)])
    (folder / "notes.csv").write_text("body\n" + "".join(f"note {n}\n" for n in range(20)))
    jsonl(folder / "alpaca.jsonl", ALPACA)
    jsonl(folder / "chats.jsonl", TALK)
    jsonl(folder / "chats-dev.jsonl", TALK[:2])
    datasets.Dataset.from_list(CALLS).to_parquet(folder / "tools.parquet")
    jsonl(folder / "qa.jsonl", [{"question": f"{n}?", "answer": f"{n}!"} for n in range(8)])
    monkeypatch.chdir(tmp_path)
    return folder


def test_there_are_examples() -> None:
    assert len(BLOCKS) == 5


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_an_example_makes_tokens(block: str, data: Path) -> None:
    given = {"model": "m", "optimizer": "adamw", **parse_yaml(block, "train.yaml").data}
    kind = "pt" if given["datasets"][0]["type"] == "text" else "sft"
    job = resolve_job({"kind": kind, "train": given})
    warnings: list[str] = []
    found = prepare(job.train, make_tiny_tokenizer(), VOCAB_SIZE, warnings.append)
    assert all(counts.learned for counts in found.counts)
    assert (found.held_out is None) == (given.get("validation_split_ratio") == 0)
    assert warnings == []
