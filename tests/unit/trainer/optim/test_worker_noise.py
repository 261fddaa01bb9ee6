"""Noise on the policy that samples: when, how much, on what; and that what is trained knows nothing of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from surogate.config.train import NoiseScheduler
from tests.helpers.models.engine import open_engine
from tests.helpers.models.tiny import make_tiny_model
from tests.unit.trainer.loss.test_worker_grpo import samples
from trainer_svc.worker.model.noise import deviation

NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")


def test_the_first_stage_has_none_and_the_others_fall_by_equal_factors() -> None:
    scheduler = NoiseScheduler(enabled=True, sigma_start=0.1, sigma_end=0.001, num_stages=4)
    found = [deviation(step, 40, scheduler) for step in (1, 9, 10, 19, 20, 30, 40, 99)]
    assert found == pytest.approx([0, 0, 0.1, 0.1, 0.01, 0.001, 0.001, 0.001])
    assert deviation(30, 40, NoiseScheduler(num_stages=4)) == 0
    assert deviation(20, 40, NoiseScheduler(enabled=True, num_stages=2)) == 0.05


def test_it_is_on_the_norms_of_pushes_and_the_same_for_a_version(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", hidden=256)
    noise = {"enabled": True, "sigma_start": 0.1, "sigma_end": 0.1, "num_stages": 2}
    train = {"model": str(tmp_path / "model"), "sequence_len": 64, "max_steps": 2, "lora": False}
    noisy, _ = open_engine("grpo", tmp_path / "noisy", {**train, "noise_scheduler": noise})
    calm, _ = open_engine("grpo", tmp_path / "calm", train)
    for engine, folder in ((noisy, tmp_path / "n"), (calm, tmp_path / "c")):
        folder.mkdir()
        engine.train_step(1, samples())
    pushed = load_file(noisy.export_weights(1, str(tmp_path / "n")).path)
    clean = load_file(calm.export_weights(1, str(tmp_path / "c")).path)
    changed = {name: pushed[name] - weight for name, weight in clean.items() if not torch.equal(pushed[name], weight)}
    assert set(changed) == {name for name in clean if name.endswith(NORMS)}
    assert float(torch.cat([*changed.values()]).std()) == pytest.approx(0.1, rel=0.1)
    (tmp_path / "again").mkdir()
    again = load_file(noisy.export_weights(1, str(tmp_path / "again")).path)
    assert all(torch.equal(again[name], weight) for name, weight in pushed.items())
    other = load_file(noisy.export_weights(2, str(tmp_path / "again")).path)
    assert not torch.equal(other["model.norm.weight"], pushed["model.norm.weight"])

    saved = load_file(Path(noisy.checkpoint(final=False).path) / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in clean.items())
    assert noisy.train_step(2, samples(seed=2))["loss"] == calm.train_step(2, samples(seed=2))["loss"]
