"""Every key of the configuration reference is known, with the reference's default."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from surogate.config.base import ConfigModel
from surogate.config.grpo import InferConfig, OrchConfig, TrainConfig
from surogate.config.problems import violations_of
from surogate.errors import Violation

TRAIN_DEFAULTS: dict[str, Any] = {
    "run_name": "auto",
    "output_dir": "output",
    "checkpoint_dir": None,
    "resume_from_checkpoint": True,
    "save_steps": 50,
    "save_total_limit": 5,
    "from_scratch": False,
    "num_epochs": 3,
    "max_steps": -1,
    "logging_steps": 1,
    "train_seed": 1234,
    "eval_seed": 1234,
    "model_type": "auto",
    "torch_dtype": "auto",
    "sequence_len": 1024,
    "max_model_len": None,
    "rope_scaling": None,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "sample_packing": True,
    "eval_steps": 100,
    "dataloader_num_workers": "auto",
    "pad_to_multiple_of": 1,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "warmup_steps": 0,
    "cooldown_steps": 0,
    "final_lr_fraction": 0.0,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "adamw_beta1": 0.9,
    "adamw_beta2": 0.999,
    "adamw_epsilon": 1e-8,
    "normuon_momentum": 0.95,
    "normuon_beta2": 0.95,
    "normuon_cautious_wd": True,
    "recompute": True,
    "lmhead_chunks": 1,
    "optimizer": "adamw_8bit",
    "offload_optimizer": False,
    "cpu_training": False,
    "gpus": 1,
    "zero_level": 1,
    "recipe": "bf16",
    "master_dtype": None,
    "gradient_dtype": None,
    "fp8_amax_history": 16,
    "skip_quant_first_layers": 0,
    "skip_quant_last_layers": 0,
    "lora": True,
    "lora_rank": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_dtype": "fp32",
    "lora_target_modules": ["all"],
    "train_embeddings": True,
    "train_lm_head": True,
    "adapter_path": None,
    "adapter_init_mode": "merge",
    "merge_adapter": False,
    "qlora_bnb": False,
    "qlora_bnb_block_size": 64,
    "qlora_bnb_double_quant": True,
    "qlora_fp8": False,
    "qlora_fp4": False,
    "qlora_block_size": 128,
    "qlora_four_over_six": True,
    "datasets": None,
    "validation_datasets": None,
    "validation_split_ratio": 0.1,
    "use_chat_template": True,
    "template": "auto",
    "system": None,
    "max_length": None,
    "truncation_strategy": "delete",
    "padding_side": "right",
    "loss_scale": "default",
    "response_prefix": None,
    "report_to": None,
    "log_file": None,
    "wandb_project": None,
    "wandb_name": None,
    "log_gpu_util": 100,
    "peak_tflops": None,
    "early_stop": False,
    "auto_lr_reduction": False,
    "epoch_adjustment": False,
    "max_async_level": 1,
    "doc_masking": True,
    "single_sample_bins": False,
}
INFER_DEFAULTS: dict[str, Any] = {
    "model": None,
    "host": None,
    "port": 8000,
    "dtype": "auto",
    "max_model_len": None,
    "max_num_seqs": None,
    "kv_cache_dtype": None,
    "enforce_eager": False,
    "trust_remote_code": False,
    "tp": 1,
    "dp": 1,
    "enable_lora": True,
    "max_lora_rank": None,
    "max_loras": 8,
    "max_cpu_loras": 100,
    "enable_prefix_caching": None,
    "gpu_memory_utilization": 0.9,
    "rope_scaling": None,
}
ORCH_DEFAULTS: dict[str, Any] = {
    "batch_size": 128,
    "seq_len": 2048,
    "max_steps": None,
    "max_async_level": 1,
    "max_off_policy_steps": 8,
    "oversampling_factor": 1.0,
    "output_dir": "outputs/run_default",
    "seed": 42,
    "report_to": None,
    "filters": [],
}
MODELS: list[tuple[type[ConfigModel], dict[str, Any], dict[str, Any]]] = [
    (TrainConfig, {"model": "m"}, TRAIN_DEFAULTS),
    (InferConfig, {}, INFER_DEFAULTS),
    (OrchConfig, {"env": [{"id": "e"}], "rollouts_per_example": 8}, ORCH_DEFAULTS),
]
NO_EFFECT = [
    (TrainConfig, "use_cuda_graphs"),
    (TrainConfig, "apply_recommended_values"),
    (TrainConfig, "transport_type"),
    (InferConfig, "weight_broadcast_type"),
    (OrchConfig, "rollout_transport"),
    (OrchConfig, "use_token_client"),
]
NOT_YET = [
    (TrainConfig, "ep_size", 2),
    (TrainConfig, "dpo_beta", 0.1),
    (TrainConfig, "distillation", {}),
    (TrainConfig, "long_context", True),
    (TrainConfig, "type", "dpo"),
    (InferConfig, "reasoning_parser", "x"),
    (OrchConfig, "teacher_model", {}),
]


def required(model: type[ConfigModel]) -> dict[str, Any]:
    return next(given for known, given, _ in MODELS if known is model)


def violations(model: type[ConfigModel], data: dict[str, Any]) -> list[str]:
    try:
        model.model_validate(data)
    except ValidationError as error:
        return [str(item) for item in violations_of(error)]
    return []


@pytest.mark.parametrize(("model", "given", "defaults"), MODELS)
def test_defaults_are_those_of_the_reference(
    model: type[ConfigModel], given: dict[str, Any], defaults: dict[str, Any]
) -> None:
    assert {key: getattr(model.model_validate(given), key) for key in defaults} == defaults


@pytest.mark.parametrize(("model", "given", "defaults"), MODELS)
def test_every_default_may_be_written_out(
    model: type[ConfigModel], given: dict[str, Any], defaults: dict[str, Any]
) -> None:
    assert model.model_validate({**given, **defaults}) == model.model_validate(given)


@pytest.mark.parametrize(("model", "key"), NO_EFFECT)
def test_engine_keys_are_accepted_with_one_warning(model: type[ConfigModel], key: str) -> None:
    warnings: list[Violation] = []
    model.model_validate({**required(model), key: True}, context={"warnings": warnings})
    assert [item.field for item in warnings] == [key]
    assert "has no effect here" in warnings[0].description


@pytest.mark.parametrize(("model", "key", "value"), NOT_YET)
def test_keys_to_come_are_refused(model: type[ConfigModel], key: str, value: object) -> None:
    assert violations(model, {**required(model), key: value}) == [f"{key}: known, not supported yet"]


def test_blocks_of_other_features_are_accepted_when_off() -> None:
    off = {"ruler": {"enabled": False}, "buffer": {"hash_keys": ["task", "prompt"], "easy_fraction": 0}}
    assert violations(OrchConfig, {**required(OrchConfig), **off}) == []


@pytest.mark.parametrize(
    ("ruler", "why"),
    [
        ({}, "ruler.judge.base_url: is needed"),
        ({"judge": {"base_url": "https://api.example.org/v1"}}, "ruler.judge_model: is needed"),
        ({"judge": {"base_url": "api.example.org"}}, "ruler.judge.base_url.0: must be http(s)"),
        ({"judge": {"base_url": "grpc://h:1", "api_key_var": "SUROGATE_TOKEN"}}, "ruler.judge.api_key_var"),
        ({"judge": {"base_url": "grpc://h:1"}, "mode": "instead"}, "ruler.mode"),
        ({"judge": {"base_url": "grpc://h:1"}, "max_concurrent_judges": 0}, "ruler.max_concurrent_judges"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused(ruler: dict[str, object], why: str) -> None:
    found = violations(OrchConfig, {**required(OrchConfig), "ruler": {"enabled": True, **ruler}})
    assert len(found) == 1 and found[0].startswith(why), found


def test_a_judge_of_ours_needs_no_model() -> None:
    ruler = {"enabled": True, "judge": {"base_url": "grpc://127.0.0.1:50080"}}
    assert violations(OrchConfig, {**required(OrchConfig), "ruler": ruler}) == []


@pytest.mark.parametrize("value", ["none", ["none"], [], None])
def test_report_to_may_say_none(value: object) -> None:
    assert TrainConfig.model_validate({"model": "m", "report_to": value}).report_to is None


def test_report_to_takes_one_or_several() -> None:
    assert TrainConfig.model_validate({"model": "m", "report_to": "wandb"}).report_to == ["wandb"]
    several = ["mlflow", "none", "tensorboard", "mlflow"]
    assert TrainConfig.model_validate({"model": "m", "report_to": several}).report_to == ["mlflow", "tensorboard"]
    assert "aim is known, not supported yet" in violations(TrainConfig, {"model": "m", "report_to": ["aim"]})[0]
    assert violations(TrainConfig, {"model": "m", "report_to": ["comet"]})[0].startswith("report_to.0")


def test_other_spellings_load() -> None:
    given = {
        "model": "m",
        "min_lr_ratio": 0.1,
        "optimizer": "adamw_torch",
        "torch_dtype": "fp32",
        "lora_dtype": "float32",
    }
    train = TrainConfig.model_validate(given)
    assert (train.final_lr_fraction, train.optimizer, train.torch_dtype, train.lora_dtype) == (
        0.1,
        "adamw",
        "float32",
        "fp32",
    )
    assert violations(TrainConfig, {"model": "m", "min_lr_ratio": 0.1, "final_lr_fraction": 0.2}) == [
        "final_lr_fraction: is another name of `final_lr_fraction`, which is set to another value: remove one"
    ]
