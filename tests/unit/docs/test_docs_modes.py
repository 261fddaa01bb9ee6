"""Every configuration in docs/training-modes.md and docs/precision.md trains, on a small model and a CPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from surogate.config.load import parse_yaml
from tests.helpers.models.architectures import make_model
from tests.helpers.models.engine import open_engine
from tests.helpers.models.tiny import make_tiny_adapter, make_tiny_model
from tests.helpers.trainer.rank_program import emulated_recipe
from tests.unit.trainer.loss.test_worker_grpo import samples
from trainer_svc.worker.adapters.given import WEIGHTS_FILE

DOCS = Path(__file__).parents[3] / "docs"
BLOCKS = [
    (page, number, block)
    for page in ("training-modes.md", "precision.md")
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL))
]
STORAGES = ("qlora_bnb", "qlora_fp8", "qlora_fp4")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that paths of the pages start from."""
    path = tmp_path_factory.mktemp("place")
    make_tiny_model(path / "model")
    make_model("qwen3-moe", path / "mixture")
    make_tiny_adapter(path / "adapter", path / "model", rank=8, alpha=16)
    texts = [f"{n} sheep jump over the fence." for n in range(60)]
    chats = [[{"role": "user", "content": "And?"}, {"role": "assistant", "content": text}] for text in texts]
    for name in ("text.jsonl", "data.jsonl"):
        (path / name).write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    return path


def test_there_are_examples() -> None:
    assert len(BLOCKS) == 10 + 2


def trained(block: str, place: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    """Trains two steps as the block says; returns the configuration."""
    monkeypatch.chdir(place)
    given = parse_yaml(block, "train.yaml").data
    kind = "grpo" if "datasets" not in given else "pt" if given["datasets"][0]["type"] == "text" else "sft"
    small = {"max_steps": 2, "sequence_len": 128, "output_dir": str(out), "lora": kind != "pt"}
    train = {**small, "optimizer": "adamw_8bit", **given, **{key: small[key] for key in ("max_steps", "output_dir")}}
    train = {**train, "sequence_len": 128, **changes}
    with emulated_recipe():
        engine, reporter = open_engine(kind, out, train)
    if kind == "grpo":
        assert engine.train_step(1, samples())["grad_norm"] > 0
        return train
    engine.run()
    assert len(reporter.losses) == 2 and all(0 < loss < 10 for loss in reporter.losses)
    return train


@pytest.mark.parametrize(("page", "number", "block"), BLOCKS, ids=[f"{page}-{number}" for page, number, _ in BLOCKS])
def test_an_example_trains(
    page: str, number: int, block: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"skip_quant_last_layers": 1} if "skip_quant_last_layers" in block else {}  # of the two that there are
    train = trained(block, place, tmp_path, monkeypatch, **few)
    if "datasets" in train:
        assert (tmp_path / (WEIGHTS_FILE if train["lora"] else "model.safetensors")).is_file()
        assert (tmp_path / "merged").is_dir() == bool(train.get("merge_adapter"))


@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_trains(storage: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [block for _, _, block in BLOCKS if "qlora_bnb: true" in block]
    trained(block, place, tmp_path, monkeypatch, **{other: other == storage for other in STORAGES})
