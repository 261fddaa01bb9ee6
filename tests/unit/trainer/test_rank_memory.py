"""Weights in shares are collected by the rank that writes them, one kind of tensors after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.models.tiny import make_tiny_model
from trainer_svc.rank_plan import RankPlan

FULL = 76e6
"""Bytes of the model in float32. Its largest matrix has 2.1 MB."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What gather_program.py leaves."""
    folder = tmp_path_factory.mktemp("gathered")
    make_tiny_model(folder / "model", hidden=512, layers=8, dtype="bfloat16")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.trainer.gather_program", str(folder)],
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )
        for environment in RankPlan(2).environments()
    ]
    try:
        assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return folder


def test_they_are_written_to_the_bit(folder: Path) -> None:
    expected = load_file(folder / "model" / "model.safetensors")
    written = load_file(folder / "output" / "checkpoint-0" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], weight) for name, weight in expected.items())

    state = folder / "output" / "checkpoint-1" / "trainer_state"
    masters, moments = load_file(state / "master.safetensors"), load_file(state / "optimizer.safetensors")
    weights = [load_file(path) for path in (
        folder / "output" / "checkpoint-1" / "model.safetensors",
        folder / "output" / "model.safetensors",
        folder / "weights-1.safetensors",
    )]  # fmt: skip
    assert {name.partition("|")[0] for name in moments} == set(masters)
    for name, master in masters.items():
        assert moments[f"{name}|exp_avg"].shape == master.shape
        assert all(torch.equal(found[name], master.to(torch.bfloat16)) for found in weights)


def test_only_the_writing_rank_holds_them(folder: Path) -> None:
    first, other = (json.loads((folder / f"rise-{rank}.json").read_text()) for rank in (0, 1))
    assert first["checkpoint"] > FULL  # masters, or moments
    assert first["push"] > 0.45 * FULL  # bfloat16
    assert max(other.values()) < 0.8 * FULL, other
