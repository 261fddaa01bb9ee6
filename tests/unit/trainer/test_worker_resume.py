"""A run that was cut and resumed from its checkpoint gives the losses, and the weights, of one that was not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from surogate.errors import ConfigError
from tests.helpers.models.engine import KeepingReporter, open_engine, sample
from tests.helpers.models.tiny import VOCAB_SIZE, make_tiny_model
from trainer_svc.worker.engine import Engine

STEPS, CUT = 4, 2
COMMON: dict[str, Any] = {"sequence_len": 64, "max_steps": STEPS, "learning_rate": 1e-3, "warmup_steps": 2}
SUPERVISED: dict[str, Any] = {
    **COMMON,
    "sequence_len": 256,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.1,
    "lora_rank": 4,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tiny_model(path, std=0.1)
    texts = [f"{n} sheep jump over the fence, and {n + 1} follow them." for n in range(40)]
    messages = [[{"role": "user", "content": t}, {"role": "assistant", "content": t[::-1]}] for t in texts]
    (path / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    (path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in messages))
    return path


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in engine.session.policy.trainable().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize(
    ("kind", "data", "keys"),
    [
        ("pt", {"path": "text.jsonl", "type": "text"}, {"lora": False}),
        ("sft", {"path": "chat.jsonl", "type": "conversation"}, {"lora": True}),
        ("sft", {"path": "chat.jsonl", "type": "conversation"}, {"lora": True, "torch_dtype": "bfloat16"}),
    ],
    ids=["pt", "lora", "lora in bfloat16"],
)
def test_supervised(model: Path, tmp_path: Path, kind: str, data: dict[str, str], keys: dict[str, Any]) -> None:
    train = {**SUPERVISED, "model": str(model), "datasets": [{**data, "path": str(model / data["path"])}], **keys}

    def run(folder: Path, stop_after: int | None = None, threads: int = 0) -> tuple[Engine, KeepingReporter]:
        wanted = {**train, "dataloader_num_workers": threads}
        engine, reporter = open_engine(kind, folder, wanted, KeepingReporter(stop_after))
        stopped = engine.run().stopped
        assert stopped == (stop_after is not None)
        if stopped:
            engine.stop(save=True)
        return engine, reporter

    calm, whole = run(tmp_path / "calm")
    _, first = run(tmp_path / "cut", CUT)
    resumed, second = run(tmp_path / "cut", threads=2)  # reading ahead changes nothing
    assert list(first.steps) == list(range(1, CUT + 1))
    assert list(second.steps) == list(range(CUT + 1, STEPS + 1))
    assert first.losses + second.losses == whole.losses
    assert_same(weights(resumed), weights(calm))


@pytest.mark.parametrize("lora", [True, False])
def test_reinforcement(model: Path, tmp_path: Path, lora: bool) -> None:
    train = {**COMMON, "model": str(model), "lora": lora, "lora_rank": 4}

    def steps(engine: Engine, numbers: range) -> list[float]:
        return [engine.train_step(number, rollouts(number))["loss"] for number in numbers]

    calm, _ = open_engine("grpo", tmp_path / "calm", train, fresh=True)
    losses = steps(calm, range(1, STEPS + 1))
    first, _ = open_engine("grpo", tmp_path / "cut", train, fresh=True)
    found = steps(first, range(1, CUT + 1))
    saved = first.checkpoint(final=False)
    steps(first, range(CUT + 1, CUT + 2))  # what comes after the checkpoint is lost
    resumed, _ = open_engine("grpo", tmp_path / "cut", train, resume_from=saved.path)
    assert resumed.session.step == CUT
    assert found + steps(resumed, range(CUT + 1, STEPS + 1)) == losses
    assert_same(weights(resumed), weights(calm))


def rollouts(seed: int) -> list[Any]:
    """Rollouts of uneven lengths."""
    draw = random.Random(seed)
    found = []
    for number in range(8):
        ids = [draw.randrange(4, VOCAB_SIZE) for _ in range(draw.randint(6, 30))]
        found.append(sample(f"{number}", ids, 4, advantage=draw.choice([-1.0, 1.0]), temperature=0.7))
    return found


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        (
            "sft",
            {"lora": True},
            r"train\.output_dir: has checkpoints of a pt run, and this is sft: choose another folder",
        ),
        ("pt", {"lora": True}, r"train\.lora: is true, and .*checkpoint-1 has all weights of a model, and no adapter"),
    ],
)
def test_another_kind_of_run_does_not_go_on(
    model: Path, tmp_path: Path, kind: str, keys: dict[str, Any], said: str
) -> None:
    data = [{"path": str(model / "text.jsonl"), "type": "text"}]
    train = {**SUPERVISED, "model": str(model), "datasets": data, "lora": False, "max_steps": 1, "warmup_steps": 0}
    open_engine("pt", tmp_path, train)[0].run()
    with pytest.raises(ConfigError, match=f"{said}.*or set resume_from_checkpoint: false to start anew"):
        open_engine(kind, tmp_path, {**train, **keys})
    engine, reporter = open_engine(kind, tmp_path, {**train, **keys, "resume_from_checkpoint": False})
    engine.run()
    assert len(reporter.losses) == 1


@pytest.mark.parametrize("keys", [{"lora_rank": 2}, {"lora_alpha": 9}, {"lora_target_modules": ["q_proj"]}])
def test_another_adapter_does_not_go_on(model: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    data = [{"path": str(model / "text.jsonl"), "type": "text"}]
    train = {**SUPERVISED, "model": str(model), "datasets": data, "max_steps": 1, "warmup_steps": 0}
    open_engine("sft", tmp_path, train)[0].run()
    said = rf"train\.{next(iter(keys))}: .*checkpoint-1.*set resume_from_checkpoint: false to start anew"
    with pytest.raises(ConfigError, match=said):
        open_engine("sft", tmp_path, {**train, **keys})
