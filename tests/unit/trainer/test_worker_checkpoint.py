"""Checkpoints under trouble: a full disk, a damaged file, a kill in the middle; and what a final model comes with."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig

from surogate.errors import DataLossError
from surogate.storage.whole import new_folder
from tests.helpers.models.engine import open_engine
from tests.helpers.models.tiny import make_tiny_model, make_tiny_tokenizer
from tests.unit.trainer.loss.test_worker_grpo import samples
from trainer_svc.worker.checkpoints import checkpoint as module
from trainer_svc.worker.folders.checkpoint_folders import newest_good, verify


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that refuses: writing more than `size` bytes into a file fails, whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("content", ["weights", "tokenizer"])
def test_a_disk_that_refuses_is_told_alike_whoever_writes(tmp_path: Path, content: str) -> None:
    tokenizer = make_tiny_tokenizer()
    refused = pytest.raises(OSError, match="File too large")
    with files_of_at_most(1000), refused as caught, new_folder(tmp_path / "new") as folder:
        if content == "weights":
            save_file({"w": torch.zeros(10_000)}, folder / "w.safetensors")
        else:
            tokenizer.save_pretrained(folder)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_trouble_leaves_the_previous_checkpoint_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_model(tmp_path / "model", layers=1, hidden=32)
    keys = {"model": str(tmp_path / "model"), "sequence_len": 64, "max_steps": 9, "lora": False, "recompute": False}
    output = tmp_path / "out"
    engine, _ = open_engine("grpo", output, keys)
    engine.train_step(1, samples(2))
    with files_of_at_most(20_000), pytest.raises(DataLossError, match="there is no checkpoint before it"):
        engine.checkpoint(final=False)
    first = Path(engine.checkpoint(final=False).path)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    engine.train_step(2, samples(2))
    with files_of_at_most(20_000), pytest.raises(DataLossError, match="the checkpoints before it are good"):
        engine.checkpoint(final=False)
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(DataLossError, match="No space left on device; the checkpoints before it are good") as error:
            engine.checkpoint(final=False)
    assert error.value.reason == "CHECKPOINT_NOT_WRITTEN"
    assert [path.name for path in output.iterdir()] == ["checkpoint-1"]
    verify(first)

    second = Path(engine.checkpoint(final=True).path)
    assert second == output
    weights = output / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    warnings: list[str] = []
    assert newest_good(output, warnings.append) == first
    assert "checkpoint-2 is damaged: model.safetensors" in warnings[0]

    card = (output / "README.md").read_text()
    assert "GRPO of `model`, 2 optimiser steps" in card
    assert "| learning_rate | 0.0002 |" in card
    assert (
        GenerationConfig.from_pretrained(output).eos_token_id
        == json.loads((output / "config.json").read_text())["eos_token_id"]
    )
    assert AutoTokenizer.from_pretrained(output).chat_template
