"""Which workers a job gets, and how the local launcher starts them."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator_svc.jobs.workers import worker_specs
from orchestrator_svc.launchers.base import WorkerPool, WorkerSpec
from orchestrator_svc.launchers.local import LocalPool
from orchestrator_svc.launchers.static import StaticPool, job_addresses
from orchestrator_svc.settings import OrchestratorSettings
from surogate.config.job import resolve_job
from surogate.errors import FailedPreconditionError
from surogate.rpc.channel import ClientSecurity
from tests.helpers.grpo.pools import EmptyPool
from tests.helpers.orchestrator import sft_config


def grpo(*, infer: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **orch: Any) -> Any:
    keys = {"env": [{"id": "reverse-text"}], "rollouts_per_example": 8, "max_steps": 3}
    return resolve_job(
        {
            "kind": "grpo",
            "train": {"model": "m", "optimizer": "adamw", **(train or {})},
            "infer": infer or {},
            "orch": {**keys, **orch},
        }
    )


def context(config: Any, tmp_path: Path = Path()) -> Any:
    """As much of a JobContext as launchers read."""
    return SimpleNamespace(config=config, output_dir=tmp_path, job_id="j")


def names(specs: list[WorkerSpec]) -> list[str]:
    return [f"{spec.component}-{spec.index}" for spec in specs]


def specs_of(config: Any, pool: WorkerPool | None = None) -> list[WorkerSpec]:
    return worker_specs(context(config), pool or EmptyPool())


def test_sft_needs_a_trainer() -> None:
    assert names(specs_of(resolve_job(sft_config()))) == ["trainer-0"]


def test_grpo_needs_replicas_a_trainer_and_the_built_in_rewards() -> None:
    specs = specs_of(grpo(infer={"dp": 2}))
    assert names(specs) == ["inference-0", "inference-1", "trainer-0", "reward-0"]
    assert specs[0].config is not None
    assert specs[0].config["model"] == "m"
    assert [spec.port for spec in specs] == [0, 0, 0, 0]


def test_replicas_listen_from_the_port_that_was_chosen() -> None:
    specs = specs_of(grpo(infer={"dp": 2, "port": 9100, "host": "127.0.0.2"}))
    assert [(spec.host, spec.port) for spec in specs[:2]] == [("127.0.0.2", 9100), ("127.0.0.2", 9101)]


def test_the_choice_of_port_survives_the_store() -> None:
    job = grpo(infer={"port": 9100})
    assert specs_of(resolve_job(job.to_dict()))[0].port == 9100
    assert specs_of(resolve_job(grpo().to_dict()))[0].port == 0


def test_replicas_of_a_quantised_base_load_the_model_and_need_nothing_of_the_trainers_disk() -> None:
    config = specs_of(grpo(train={"qlora_bnb": True}))[0].config
    assert config == specs_of(grpo())[0].config


def test_a_job_with_a_reward_service_of_its_own_starts_none() -> None:
    own = {"id": "mine", "address": "rewards:5000"}
    assert "reward-0" not in names(specs_of(grpo(env=[own])))
    assert "reward-0" not in names(specs_of(grpo(env=[own], eval={"env": [{"id": "mine"}]})))
    assert "reward-0" in names(specs_of(grpo(env=[own], eval={"env": [{"id": "reverse-text"}]})))


async def test_a_taken_port_names_the_key(tmp_path: Path) -> None:
    pool = LocalPool(context(grpo(), tmp_path), OrchestratorSettings(), [])
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(FailedPreconditionError, match=rf"infer\.port: .*127\.0\.0\.1:{port}"):
            await pool.start(WorkerSpec("inference", 0, port=port, port_key="infer.port"))


async def test_a_static_pool_has_what_it_has() -> None:
    addresses: Any = {"trainer": ["t:1"], "inference": ["a:1", "b:1", "c:1"], "reward": []}
    pool = StaticPool(addresses, ClientSecurity(), 1.0)
    assert names(specs_of(grpo(env=[{"id": "mine", "address": "r:1"}]), pool))[:3] == [
        "inference-0",
        "inference-1",
        "inference-2",
    ]
    with pytest.raises(FailedPreconditionError, match="reward_address"):
        pool.count("reward", 1)


def test_a_job_may_name_its_own_inference_addresses() -> None:
    job = grpo(client={"base_url": ["http://gpu-1:8000/v1", "gpu-2:8000"]})
    assert job_addresses(context(job)) == ["gpu-1:8000", "gpu-2:8000"]
    assert job_addresses(context(grpo())) == []
