"""How many processes a configuration asks for, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from surogate.config.train import TrainConfig
from surogate.errors import ConfigError
from trainer_svc.rank_plan import RankPlan, count_gpus, plan_ranks

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
TWO_GPUS = {"CUDA_VISIBLE_DEVICES": "0,3"}
MEETING = {"MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}


def config(**train: Any) -> TrainConfig:
    return TrainConfig.model_validate({"model": "m", "optimizer": "adamw", **train})


@pytest.mark.parametrize(
    ("train", "environment", "expected"),
    [
        ({}, TWO_GPUS, RankPlan(1)),
        ({"gpus": 0}, TWO_GPUS, RankPlan(2)),
        ({"gpus": 0}, NO_GPU, RankPlan(1)),
        ({"gpus": 4}, NO_GPU, RankPlan(4)),
        ({"gpus": 4, "cpu_training": True}, TWO_GPUS, RankPlan(4)),
        ({"gpus": 0, "cpu_training": True}, TWO_GPUS, RankPlan(1)),
        (
            {"gpus": 1, "distributed": {"num_nodes": 3, "gpus_per_node": 2}},
            {**TWO_GPUS, **MEETING},
            RankPlan(2, 3, ("node-0", 29500)),
        ),
    ],
)
def test_processes(train: dict[str, Any], environment: dict[str, str], expected: RankPlan) -> None:
    assert plan_ranks(config(**train), environment) == expected


@pytest.mark.parametrize(
    ("train", "environment", "said"),
    [
        ({"gpus": 3}, TWO_GPUS, "train.gpus: is 3, and this machine has 2 GPUs"),
        ({"distributed": {"gpus_per_node": 3}}, TWO_GPUS, "train.distributed.gpus_per_node: is 3"),
        ({"distributed": {"num_nodes": 2}}, NO_GPU, "train.distributed.num_nodes: needs MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(train: dict[str, Any], environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_ranks(config(**train), environment)


@pytest.mark.parametrize(
    ("train", "key"),
    [
        ({"gpus": 2, "offload_optimizer": True}, "offload_optimizer"),
        ({"zero_level": 4}, "zero_level"),
        ({"gpus": -1}, "gpus"),
    ],
)
def test_what_does_not_go_together_is_refused(train: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        config(**train)


def test_ranks_find_each_other_as_those_of_torchrun_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plan = RankPlan(2, 2, ("node-0", 29500))
    here = plan.environments(node=1)
    assert [(one["RANK"], one["LOCAL_RANK"], one["WORLD_SIZE"]) for one in here] == [("2", "0", "4"), ("3", "1", "4")]
    assert {(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in here} == {("node-0", "29500")}
    assert int(here[0]["OMP_NUM_THREADS"]) >= 1


def test_hidden_gpus_do_not_count() -> None:
    assert [count_gpus({"CUDA_VISIBLE_DEVICES": value}) for value in ("", "-1", "1", "0,1,2")] == [0, 0, 1, 3]
