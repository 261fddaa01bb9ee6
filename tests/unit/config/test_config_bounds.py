"""Whole numbers have bounds, and what is written goes into no folder of the system."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from surogate.config.cluster import ClusterConfig
from surogate.config.folders import file_refusal, refusal
from surogate.config.infer import InferConfig
from surogate.config.orch import OrchConfig
from surogate.config.problems import violations_of
from surogate.config.train import TrainConfig

CHECKED = {"max_steps", "dataloader_num_workers", "num_examples", "min_tokens", "qlora_bnb_block_size"}
"""Keys whose bounds are a validator's; see below."""


def unbounded(schema: Any, name: str = "") -> Iterator[str]:
    """Names of the whole numbers in a JSON schema that lack a least or a greatest value."""
    if isinstance(schema, list):
        for item in schema:
            yield from unbounded(item, name)
    elif isinstance(schema, dict):
        if schema.get("type") == "integer" and not ({"minimum", "maximum"} <= set(schema) or "enum" in schema):
            yield name
        for key, inner in schema.items():
            names = inner if key in ("properties", "$defs") else {name: inner}
            for inner_name, value in names.items():
                yield from unbounded(value, inner_name)


@pytest.mark.parametrize("model", [TrainConfig, InferConfig, OrchConfig, ClusterConfig])
def test_every_whole_number_has_bounds(model: type[BaseModel]) -> None:
    assert set(unbounded(model.model_json_schema())) <= CHECKED


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_steps": 2**40}, "max_steps: must be -1 or a whole number of 1 to 1000000000, got 1099511627776"),
        (
            {"dataloader_num_workers": 5000},
            "dataloader_num_workers: must be auto or a whole number of 0 to 1024, got 5000",
        ),
        ({"num_epochs": 2**31}, "num_epochs: must be 1000000 or less, got 2147483648"),
        ({"sequence_len": 2**25}, "sequence_len: must be 16777216 or less, got 33554432"),
        ({"gpus": 100_000}, "gpus: must be 1024 or less, got 100000"),
        ({"save_steps": 2**31}, "save_steps: must be 1000000000 or less, got 2147483648"),
        ({"output_dir": "/"}, "output_dir: is /, where other files lie: name a folder of the job's own below it"),
        (
            {"checkpoint_dir": "/etc/x"},
            "checkpoint_dir: is /etc/x, and /etc belongs to the system: name another folder",
        ),
        ({"log_file": "/usr/lib/log"}, "log_file: is /usr/lib/log, and /usr belongs to the system"),
    ],
)
def test_what_is_said_of_numbers_and_folders(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainConfig.model_validate({"model": "m", **keys})
    [violation] = violations_of(caught.value)
    assert str(violation).startswith(message)


def test_counts_of_replicas_and_of_examples_are_bounded() -> None:
    with pytest.raises(ValidationError) as caught:
        InferConfig.model_validate({"tp": 2000, "dp": 2000, "max_num_seqs": 10**6})
    assert [violation.field for violation in violations_of(caught.value)] == ["max_num_seqs", "tp", "dp"]
    with pytest.raises(ValidationError, match="must be -1 or a whole number of 1 to 1000000"):
        OrchConfig.model_validate({"env": [{"id": "a"}], "eval": {"env": [{"id": "a"}], "num_examples": 10**7}})


@pytest.mark.parametrize(
    "folder",
    ["/", "//", "/tmp/..", "/tmp", "/home", "/etc", "/etc/x/../y", "/usr/share/x", "/dev", "/proc/1", "~", "~/"],
)
def test_folders_of_the_system_and_of_everybody_are_refused(folder: str) -> None:
    assert refusal(folder)


@pytest.mark.parametrize(
    "folder",
    ["outputs", "./x", "/tmp/x", "/home/me", "/data", "/mnt", "/dev/shm/x", "/usr/local/x", "/var/lib/x", "~/x"],
)
def test_folders_of_ones_own_are_not(folder: str) -> None:
    assert not refusal(folder)


def test_a_home_is_refused_by_its_path_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert refusal(str(tmp_path)) == refusal("~") != ""
    assert not refusal(str(tmp_path / "x"))
    assert not file_refusal(str(tmp_path / "train.log"))
