"""Checkpoints in an object store: cut uploads, other machines with empty disks, retention, a trainer that is killed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from surogate.caches import VARIABLE
from surogate.errors import DataLossError
from surogate.storage import objects
from surogate.v1 import trainer_pb2
from tests.helpers.models.engine import KeepingReporter, open_engine, sample
from tests.helpers.models.tiny import make_tiny_model
from tests.helpers.object_store import BUCKET, Store, environment, object_store
from tests.helpers.trainer.trainer_process import trainer_process
from trainer_svc.worker.engine import Engine

RUNS = f"s3://{BUCKET}/runs/a"
MODEL = f"s3://{BUCKET}/models/tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder, layers=1, hidden=32)
    return folder


@pytest.fixture
def store(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(objects, "FIRST_PAUSE", 0.01)
    with object_store(monkeypatch) as store:
        for path in model.iterdir():
            store.put(f"models/tiny/{path.name}", path.read_bytes())
        yield store


def keys(**changes: Any) -> dict[str, Any]:
    """A LoRA policy whose base and whose checkpoints are in the store."""
    lora = {"lora": True, "lora_rank": 4, "lora_alpha": 8}
    return {"model": MODEL, "checkpoint_dir": RUNS, "sequence_len": 64, "max_steps": 9, **lora, **changes}


def samples() -> list[trainer_pb2.TrainingSample]:
    """Two rollouts, one good and one bad."""
    return [sample(f"{index}", [5, 6, 7 + index, 9], 2, advantage=1.0 - 2 * index) for index in range(2)]


def train(engine: Engine, *steps: int) -> None:
    """Trains the steps, and writes a checkpoint after each."""
    for step in steps:
        engine.train_step(step, samples())
        engine.checkpoint(final=False)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in engine.session.policy.trainable().items()}


def test_another_machine_with_an_empty_disk_goes_on_to_the_bit(store: Store, tmp_path: Path) -> None:
    first, _ = open_engine("grpo", tmp_path / "first", keys())
    train(first, 1, 2)
    saved = first.checkpoint(final=False)
    assert (saved.step, saved.path) == (2, f"{RUNS}/checkpoint-2")
    first.train_step(3, samples())

    second, _ = open_engine("grpo", tmp_path / "second", keys())
    assert second.session.step == 2
    second.train_step(3, samples())
    assert all(torch.equal(weight, weights(first)[name]) for name, weight in weights(second).items())

    third, _ = open_engine("grpo", tmp_path / "third", keys(), resume_from=f"{RUNS}/checkpoint-1")
    assert third.session.step == 1


def test_data_in_the_store_is_trained_on(store: Store, tmp_path: Path) -> None:
    store.put("data/text.jsonl", b"\n".join(b'{"text": "%d sheep jump"}' % number for number in range(20)))
    datasets = [{"path": f"s3://{BUCKET}/data/text.jsonl", "type": "text"}]
    supervised = keys(lora=False, max_steps=2, datasets=datasets, save_steps=1, validation_split_ratio=0.0)
    engine, reporter = open_engine("pt", tmp_path / "out", supervised)
    assert not engine.run().stopped
    assert reporter.checkpoints[-2:] == [(2, f"{RUNS}/checkpoint-2", False), (2, f"{RUNS}/final", True)]


def test_adapters_name_their_base_as_the_configuration_does(store: Store, tmp_path: Path) -> None:
    engine, _ = open_engine("grpo", tmp_path / "out", keys())
    train(engine, 1)
    final = engine.checkpoint(final=True)
    assert final.path == f"{RUNS}/final"
    config = store.client.get_object(Bucket=BUCKET, Key="runs/a/final/adapter_config.json")["Body"].read().decode()
    assert f'"base_model_name_or_path": "{MODEL}"' in config
    assert "runs/a/final/COMPLETE.json" in store.stored()
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_an_upload_that_is_cut_is_told_and_costs_nothing(store: Store, tmp_path: Path) -> None:
    engine, reporter = open_engine("grpo", tmp_path / "first", keys())
    train(engine, 1)
    store.fail = lambda method, path: "503 Slow Down" if method == "PUT" and "optimizer" in path else None
    engine.train_step(2, samples())
    saved = engine.checkpoint(final=False)
    assert (saved.step, saved.path) == (1, f"{RUNS}/checkpoint-1"), "the newest from which others can go on"
    assert any("checkpoint 2 is in" in warning and "alone" in warning for warning in reporter.warnings)
    assert (tmp_path / "first" / "checkpoint-2").is_dir()
    assert any("checkpoint-2/" in key for key in store.stored()), "a part of it is there"

    same, _ = open_engine("grpo", tmp_path / "first", keys())
    assert same.session.step == 2, "its own disk has it"
    other, _ = open_engine("grpo", tmp_path / "second", keys())
    assert other.session.step == 1, "others do not see half of it"

    store.fail = lambda method, path: None
    other.train_step(2, samples())
    assert other.checkpoint(final=False).step == 2


def test_a_store_that_takes_nothing_fails_the_first_checkpoint(store: Store, tmp_path: Path) -> None:
    engine, _ = open_engine("grpo", tmp_path / "out", keys())
    engine.train_step(1, samples())
    store.fail = lambda method, path: "403 Forbidden" if method == "PUT" else None
    with pytest.raises(DataLossError, match="has no checkpoint yet") as caught:
        engine.checkpoint(final=False)
    assert caught.value.reason == "CHECKPOINT_NOT_UPLOADED"


def test_old_checkpoints_go_from_the_store_too(store: Store, tmp_path: Path) -> None:
    engine, _ = open_engine("grpo", tmp_path / "out", keys(save_total_limit=2), keep_interval=3)
    store.put("runs/a/checkpoint-1/half-a-file", b"x")
    train(engine, 1, 2, 3, 4, 5, 6)
    names = {key.split("/")[2] for key in store.stored("runs/a")}
    assert names == {"checkpoint-3", "checkpoint-5", "checkpoint-6"}


def test_a_damaged_checkpoint_is_passed_over(store: Store, tmp_path: Path) -> None:
    engine, _ = open_engine("grpo", tmp_path / "first", keys())
    train(engine, 1, 2)
    store.put("runs/a/checkpoint-2/adapter_model.safetensors", b"nonsense")
    reporter = KeepingReporter()
    other, _ = open_engine("grpo", tmp_path / "second", keys(), reporter)
    assert other.session.step == 1
    assert any("checkpoint-2 is damaged" in warning for warning in reporter.warnings)


async def test_a_killed_trainer_goes_on_in_a_fresh_folder(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(store).items():
        monkeypatch.setenv(name, value)
    config = keys(torch_dtype="float32", optimizer="adamw")
    async with trainer_process(tmp_path / "first") as trainer:
        await trainer.ready(config)
        for step in (1, 2):
            await trainer.train(step, samples())
        assert await trainer.checkpoint(2) == f"{RUNS}/checkpoint-2"
        trainer.process.process.kill()
        await trainer.process.process.wait()
    shutil.rmtree(tmp_path / "first")
    async with trainer_process(tmp_path / "second") as trainer:
        session = await trainer.ready(config, resume_from=f"{RUNS}/checkpoint-2")
        assert (session.step, session.checkpoint) == (2, f"{RUNS}/checkpoint-2")
        await trainer.train(3, samples())
        assert await trainer.checkpoint(3, final=True) == f"{RUNS}/final"
    assert "runs/a/checkpoint-3/COMPLETE.json" in store.stored()
