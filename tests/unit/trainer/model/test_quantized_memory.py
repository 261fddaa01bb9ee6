"""A model is quantised while it is read: memory stays near the size of what is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.models.tiny import make_tiny_model

FULL = 255e6
"""Bytes of the large model in float32. Its largest matrix has 4.7 MB."""

LOAD = """
import json, sys
from surogate.config.train import TrainConfig
from tests.helpers.peak import rise
from trainer_svc.worker.model.modeling import load_model

def load(folder):
    keys = {"model": folder, "torch_dtype": "float32", "sequence_len": 64}
    return load_model(TrainConfig.model_validate(keys | json.loads(sys.argv[3])))[0]

load(sys.argv[1])  # libraries are loaded, threads are there
with rise() as risen:
    model = load(sys.argv[2])
kept = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
print(json.dumps({"rise": risen.size, "kept": kept}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and one of 64 million weights. Its file has bfloat16, so that weights are not just mapped."""
    tiny, large = tmp_path_factory.mktemp("tiny"), tmp_path_factory.mktemp("large")
    make_tiny_model(tiny)
    make_tiny_model(large, hidden=768, layers=12, dtype="bfloat16")
    return tiny, large


def load(folders: tuple[Path, Path], **keys: object) -> tuple[int, int]:
    command = [sys.executable, "-c", LOAD, *map(str, folders), json.dumps(keys)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    return found["rise"], found["kept"]


@pytest.mark.parametrize("key", ["qlora_bnb", "qlora_fp8", "qlora_fp4"])
def test_peak_memory_is_near_the_quantised_size(folders: tuple[Path, Path], key: str) -> None:
    rise, kept = load(folders, **{key: True})
    assert kept < 0.3 * FULL
    assert rise < kept + 0.35 * FULL  # float32 copies of few matrices; a model that is read first is all of it


def test_without_quantising_it_is_not(folders: tuple[Path, Path]) -> None:
    rise, _ = load(folders)
    assert rise > 0.9 * FULL
