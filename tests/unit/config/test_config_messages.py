"""Bad input of every kind gets a message that names the key and says what to do."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from surogate.config.base import ConfigModel
from surogate.config.grpo import InferConfig, OrchConfig, TrainConfig
from surogate.config.problems import violations_of

TRAIN = {"model": "m", "optimizer": "adamw"}
ORCH = {"env": [{"id": "e"}], "rollouts_per_example": 8}
CHANGES = "changes the sampler's distribution in a way that training does not reproduce"


def messages(model: type[ConfigModel], data: dict[str, Any]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(data)
    return [str(item) for item in violations_of(caught.value)]


def dataset(**keys: Any) -> dict[str, Any]:
    return {"datasets": [{"path": "d.jsonl", **keys}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "learning_rat: unknown key; did you mean `learning_rate`?"),
        ({"zzz": 1}, "zzz: unknown key"),
        ({"learning_rate": -1e-4}, "learning_rate: must be 0 or more, got -0.0001"),
        ({"learning_rate": math.nan}, "learning_rate: must be a finite number, got nan"),
        ({"learning_rate": math.inf}, "learning_rate: must be a finite number, got inf"),
        ({"learning_rate": "fast"}, "learning_rate: must be a number, got 'fast'"),
        ({"learning_rate": True}, "learning_rate: must be a number, got true"),
        (
            {"learning_rate": None},
            "learning_rate: is empty: give a value, or remove the key to use the default",
        ),
        ({"sequence_len": 0}, "sequence_len: must be 1 or more, got 0"),
        ({"sequence_len": 1.5}, "sequence_len: must be a whole number, got 1.5"),
        ({"sequence_len": "1024"}, "sequence_len: must be a whole number, got '1024'"),
        ({"sequence_len": True}, "sequence_len: must be a whole number, got true"),
        ({"max_steps": 0}, "max_steps: must be -1 or a whole number of 1 to 1000000000, got 0"),
        ({"max_steps": -2}, "max_steps: must be -1 or a whole number of 1 to 1000000000, got -2"),
        (
            {"dataloader_num_workers": "many"},
            "dataloader_num_workers: must be auto or a whole number of 0 to 1024, got 'many'",
        ),
        ({"train_seed": -1}, "train_seed: must be 0 or more, got -1"),
        ({"train_seed": 2**32}, "train_seed: must be 4294967295 or less, got 4294967296"),
        ({"sample_packing": "yes"}, "sample_packing: must be true or false, got 'yes'"),
        ({"sample_packing": 1}, "sample_packing: must be true or false, got 1"),
        ({"run_name": 7}, "run_name: must be a string (put it in quotes), got 7"),
        ({"model": ""}, "model: must not be empty, got ''"),
        (
            {"output_dir": "s3://bucket/out"},
            "output_dir: must be on the disk of the machine that runs the job, not 's3://bucket/out': an object store "
            "keeps checkpoints and the final model, named by checkpoint_dir of train.yaml",
        ),
        ({"warmup_ratio": 1.5}, "warmup_ratio: must be 1 or less, got 1.5"),
        ({"adamw_beta1": 1}, "adamw_beta1: must be less than 1, got 1"),
        (
            {"lr_scheduler_type": "cosin"},
            "lr_scheduler_type: must be one of linear, cosine, wsd, constant; got 'cosin'; did you mean `cosine`?",
        ),
        ({"optimizer": "sgd"}, "optimizer: must be one of adamw_8bit, adamw, normuon; got 'sgd'"),
        (
            {"max_steps": 10, "warmup_steps": 8, "cooldown_steps": 3},
            "warmup_steps: warmup_steps and cooldown_steps are 11 steps together, more than max_steps (10)",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling: needs max_model_len, the length to scale to"),
        ({"rope_scaling": '{"factor": 2}'}, "rope_scaling: must have `rope_type`"),
        (
            {"rope_scaling": "yarm"},
            "rope_scaling: must be one of linear, dynamic, yarn, longrope, llama3, or a JSON object; got 'yarm'",
        ),
        ({"lora_target_modules": []}, "lora_target_modules: must have at least 1 item(s), got []"),
        ({"lora": False, "qlora_bnb": True}, "qlora_bnb: needs lora: true: quantised weights are not trained"),
        ({"qlora_bnb": True, "qlora_fp4": True}, "qlora_fp4: cannot be combined with qlora_bnb: choose one"),
        ({"qlora_fp8": True, "from_scratch": True}, "qlora_fp8: needs trained weights, and from_scratch is true"),
        (
            {"qlora_bnb": True, "qlora_bnb_block_size": 48},
            "qlora_bnb_block_size: must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096, got 48",
        ),
        ({"lora": False, "adapter_path": "a"}, "adapter_path: needs lora: true, and lora is false"),
        ({"lora": False, "merge_adapter": True}, "merge_adapter: needs lora: true, and lora is false"),
        ({"pad_to_multiple_of": 2048}, "pad_to_multiple_of: is 2048, more than sequence_len (1024)"),
        ({"zero_level": True}, "zero_level: must be 1, 2 or 3, got true"),
        ({"qlora_block_size": 10**6}, "qlora_block_size: must be 4096 or less, got 1000000"),
        ({"max_length": 2000}, "max_length: is 2000, more than sequence_len (1024)"),
        ({"distributed": {"num_nodes": 0}}, "distributed.num_nodes: must be 1 or more, got 0"),
        ({"distributed": {"num_node": 2}}, "distributed.num_node: unknown key; did you mean `num_nodes`?"),
        (
            {"epoch_adjustment": True, "max_steps": 9},
            "epoch_adjustment: chooses num_epochs, which max_steps overrides: remove one",
        ),
        ({"master_dtype": "bf16"}, "master_dtype: is for full fine-tuning and PT; lora_dtype is that of adapters"),
        (
            {"lora": False, "master_dtype": "bf16", "torch_dtype": "float32"},
            "master_dtype: is bf16, and needs torch_dtype: bfloat16",
        ),
        ({"gradient_dtype": "fp16"}, "gradient_dtype: must be one of fp32, bf16; got 'fp16'; did you mean `bf16`?"),
        (
            {"gradient_dtype": "bf16", "gpus": 2},
            "gradient_dtype: is for one GPU; over several, zero_level shares weights and gradients",
        ),
        ({"recipe": "fp8_hybrid", "qlora_bnb": True}, "recipe: must be bf16 with QLoRA, got fp8_hybrid"),
        ({"zero_level": 0}, "zero_level: must be 1, 2 or 3, got 0"),
        ({"recipe": "fp8"}, "recipe: must be one of bf16, fp8_hybrid, nvfp4; got 'fp8'"),
        (
            {"noise_scheduler": {"enabled": True}},
            "noise_scheduler.enabled: needs lora: false: pushes of adapters have no norms in them",
        ),
        ({"datasets": {}}, "datasets: must be a list, got {}"),
        (dataset(), "datasets.0: `type` is required: text, instruction, conversation or auto"),
        (
            dataset(type="txt"),
            "datasets.0: `type` must be one of text, instruction, conversation, auto; got 'txt'; did you mean `text`?",
        ),
        (dataset(type="text", text_feild="t"), "datasets.0.text_feild: unknown key; did you mean `text_field`?"),
        ({"datasets": [{"type": "text"}]}, "datasets.0.path: is required"),
        (dataset(type="text", samples=0), "datasets.0.samples: must be 1 or more, got 0"),
        (dataset(type="instruction", output_field="o"), "datasets.0.instruction_field: is required"),
        (
            dataset(type="instruction", instruction_field="i", output_field="o", system_prompt_type="fixed"),
            "datasets.0.system_prompt: is required with system_prompt_type: fixed",
        ),
        (
            dataset(type="instruction", instruction_field="i", output_field="o", system_prompt="s"),
            "datasets.0.system_prompt: needs system_prompt_type: fixed",
        ),
        (
            dataset(type="instruction", instruction_field="i", output_field="o", prompt_format="{instructoin}"),
            "datasets.0.prompt_format: has unknown placeholders ['instructoin']: "
            "use ['input', 'instruction', 'output', 'system']",
        ),
        (
            dataset(type="instruction", instruction_field="i", output_field="o", prompt_format="{instruction:>9d}"),
            "datasets.0.prompt_format: has a placeholder with a format (`:`) or a conversion (`!`): use "
            "{instruction} and the like alone",
        ),
        (
            dataset(
                type="instruction", instruction_field="i", output_field="o", prompt_format_no_input="{instruction}"
            ),
            "datasets.0.prompt_format_no_input: needs prompt_format, which rows with input would take",
        ),
        (
            dataset(type="instruction", instruction_field="i", output_field="o", prompt_format="{input}"),
            "datasets.0.prompt_format: must contain {instruction}",
        ),
    ],
)
def test_train(change: dict[str, Any], message: str) -> None:
    assert messages(TrainConfig, {**TRAIN, **change}) == [message]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"port": 70000}, "port: must be 65535 or less, got 70000"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization: must be greater than 0, got 0"),
        ({"dtype": "int8"}, "dtype: must be one of auto, bfloat16, float16, float32; got 'int8'"),
        ({"max_loras": 8, "max_cpu_loras": 4}, "max_cpu_loras: is 4, less than max_loras (8)"),
        ({"dp": 0}, "dp: must be 1 or more, got 0"),
    ],
)
def test_infer(change: dict[str, Any], message: str) -> None:
    assert messages(InferConfig, change) == [message]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rollouts_per_example": 1},
            "rollouts_per_example: must be 2 or more (8, say): a group of one rollout has no advantage, got 1",
        ),
        ({"batch_size": 100}, "batch_size: must be a multiple of rollouts_per_example (8), got 100"),
        ({"env": []}, "env: must have an entry: `- id: reverse-text`, for example"),
        ({"env": [{"id": "a"}, {"id": "a"}]}, "env.1: is the second one called a: give it a `name` of its own"),
        ({"buffer": {"env_ratios": [1, 2]}}, "buffer.env_ratios: has 2 entries for 1 environments"),
        (
            {"buffer": {"easy_threshold": 0.5, "hard_threshold": 0.5}},
            "buffer.hard_threshold: must be below easy_threshold (0.5), got 0.5",
        ),
        (
            {"buffer": {"skip_verification": True}},
            "buffer.skip_verification: leaves rewards at 0, which teach nothing: it needs advantage.type custom",
        ),
        (
            {"advantage": {"type": "custom"}},
            "advantage.import_path: must name a function, `module:name`, where type is custom",
        ),
        ({"advantage": {"kwargs": {"a": 1}}}, "advantage.kwargs: has a meaning with `type: custom` only"),
        ({"env": [{}]}, "env.0.id: is required"),
        ({"env": [{"id": "e", "tls": True}]}, "env.0.tls: needs `address`: the built-in service is reached without it"),
        (
            {"env": [{"id": "e", "address": "localhost"}]},
            "env.0.address: must be a gRPC address `host:port`, got 'localhost'",
        ),
        ({"env": [{"id": "e", "args": {"x": [math.nan]}}]}, "env.0.args: must hold finite numbers, got nan"),
        (
            {"env": [{"id": "e", "image": "i", "address": "a:1"}]},
            "env.0.image: and `address` are two services: give one of them",
        ),
        (
            {"sampling": {"max_tokens": 2048}},
            "sampling.max_tokens: is 2048, which leaves no room for a prompt in seq_len (2048)",
        ),
        ({"sampling": {"temperature": 0}}, "sampling.temperature: must be 0.01 or more, got 0"),
        ({"sampling": {"top_p": 0.9}}, f"sampling.top_p: must be 1, got 0.9: it {CHANGES}"),
        ({"sampling": {"top_k": 50}}, f"sampling.top_k: must be -1, got 50: it {CHANGES}"),
        (
            {"sampling": {"repetition_penalty": 1.1}},
            f"sampling.repetition_penalty: must be 1.0: a penalty {CHANGES}, got 1.1",
        ),
        ({"sampling": {"min_tokens": 4}}, f"sampling.min_tokens: must be 0: a least length {CHANGES}, got 4"),
        (
            {"sampling": {"temperature": 0.7, "temp_scheduler": {"start_temperature": 1, "end_temperature": 0.5}}},
            "sampling.temperature: is set beside temp_scheduler: remove one of them",
        ),
        (
            {"max_async_level": 3, "max_off_policy_steps": 2},
            "max_off_policy_steps: is 2, less than max_async_level (3)",
        ),
        ({"oversampling_factor": 0.5}, "oversampling_factor: must be 1 or more, got 0.5"),
        ({"ckpt": {"resume_step": -2}}, "ckpt.resume_step: must be -1 or more, got -2"),
        ({"client": {"timeout": 0}}, "client.timeout: must be greater than 0, got 0"),
        ({"eval": {"env": []}}, "eval.env: must have at least 1 item(s), got []"),
        (
            {"eval": {"env": [{"id": "e"}], "num_examples": 0}},
            "eval.num_examples: must be -1 or a whole number of 1 to 1000000, got 0",
        ),
        ({"model": "m"}, "model: must be a mapping (lines of `key: value`), got 'm'"),
    ],
)
def test_orch(change: dict[str, Any], message: str) -> None:
    assert messages(OrchConfig, {**ORCH, **change}) == [message]


def test_everything_that_is_wrong_is_said_at_once() -> None:
    wrong = {"learning_rate": -1, "lora_rnk": 4, "gpus": -1, "datasets": [{"type": "text"}], "loss": {"kl_tau": -1}}
    assert {item.partition(":")[0] for item in messages(TrainConfig, {**TRAIN, **wrong})} == {
        "learning_rate",
        "lora_rnk",
        "gpus",
        "datasets.0.path",
        "loss.kl_tau",
    }


def test_numbers_as_other_parsers_read_them() -> None:
    train = TrainConfig.model_validate({**TRAIN, "learning_rate": "2e-4", "sequence_len": 2048.0, "weight_decay": 0})
    assert (train.learning_rate, train.sequence_len, type(train.sequence_len)) == (2e-4, 2048, int)


def test_neutral_settings_of_other_samplers_are_accepted() -> None:
    orch = OrchConfig.model_validate({**ORCH, "sampling": {"top_p": 1.0, "top_k": -1, "min_p": 0, "max_tokens": 16}})
    assert orch.sampling.max_tokens == 16


def test_addresses_may_be_urls() -> None:
    orch = OrchConfig.model_validate({**ORCH, "client": {"base_url": ["http://host:8000/v1", "[::1]:5", "unix:/s"]}})
    assert orch.client.base_url == ["host:8000", "[::1]:5", "unix:/s"]


def test_message_mappings_complete_themselves() -> None:
    train = TrainConfig.model_validate(
        {**TRAIN, **dataset(type="conversation", message_property_mappings={"role": "from"})}
    )
    assert train.datasets is not None
    assert train.datasets[0].model_dump()["message_property_mappings"] == {"role": "from", "content": "content"}
