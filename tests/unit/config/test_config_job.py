"""Jobs: the three files of a GRPO job agree, and a resolved job resolves to itself."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.struct_pb2 import Struct
from hypothesis import given
from hypothesis import strategies as st

from orchestrator_svc.grpo.configured.setup import read_settings
from surogate.config.job import GrpoJob, SupervisedJob, resolve_job
from surogate.config.load import parse_yaml
from surogate.errors import ConfigError

TEXT = {"path": "a.jsonl", "type": "text"}
TALK = {"path": "a.jsonl", "type": "conversation"}
GRPO: dict[str, Any] = {
    "kind": "grpo",
    "train": {"model": "./m", "optimizer": "adamw", "max_steps": 20},
    "infer": {},
    "orch": {"env": [{"id": "reverse-text", "args": {"n": 3, "words": ["a"]}}], "rollouts_per_example": 8},
}


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


def grpo(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The job with some dotted keys changed."""
    config = copy.deepcopy(GRPO)
    for key, value in (changes or {}).items():
        block: Any = config
        *blocks, last = key.split(".")
        for name in blocks:
            block = block.setdefault(name, {})
        block[last] = value
    return config


def resolved(changes: dict[str, Any] | None = None) -> GrpoJob:
    job = resolve_job(grpo(changes))
    assert isinstance(job, GrpoJob)
    return job


def refusals(config: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve_job(config)
    assert str(caught.value) == "\n".join(map(str, caught.value.violations))
    return [str(item) for item in caught.value.violations]


def through_struct(config: dict[str, Any]) -> dict[str, Any]:
    back: dict[str, Any] = MessageToDict(ParseDict(config, Struct()))
    return back


def test_pt_trains_all_weights_unless_told_otherwise() -> None:
    job = resolve_job({"kind": "pt", "train": {"model": "m", "datasets": [TEXT]}})
    assert isinstance(job, SupervisedJob)
    assert job.kind == "pt"
    assert not job.train.lora
    assert job.warnings == []


def test_sft_trains_adapters_unless_told_otherwise() -> None:
    job = resolve_job({"kind": "sft", "train": {"model": "m", "optimizer": "adamw", "datasets": [TALK]}})
    assert isinstance(job, SupervisedJob)
    assert job.kind == "sft"
    assert job.train.lora
    assert job.warnings == []


def test_grpo_keys_in_other_jobs_are_warned_of() -> None:
    job = resolve_job(
        {"kind": "pt", "train": {"model": "m", "optimizer": "adamw", "datasets": [TEXT], "loss": {"type": "gspo"}}}
    )
    assert job.warnings == ["train.loss: has no effect in a pt job, only in GRPO"]


def test_what_one_file_leaves_unset_comes_from_the_others() -> None:
    job = resolved({"train.torch_dtype": "float32", "orch.seq_len": 256, "orch.model.lora_rank": 4})
    assert (job.infer.model, job.orch.model.name) == ("./m", "./m")
    assert (job.train.sequence_len, job.infer.max_model_len, job.orch.seq_len) == (256, 256, 256)
    assert (job.train.lora_rank, job.infer.max_lora_rank, job.orch.model.lora_rank) == (4, 4, 4)
    assert (job.train.lora_alpha, job.orch.model.lora_alpha) == (32, 32)
    assert (job.train.max_steps, job.orch.max_steps) == (20, 20)
    assert job.infer.dtype == "float32"
    assert job.infer.enable_lora
    assert (job.orch.ckpt.interval, job.orch.ckpt.keep_last) == (50, 5)
    assert job.train.lora_dropout == 0
    assert job.warnings == []


def test_the_model_may_be_named_in_any_file() -> None:
    config = grpo({"infer.model": "./m"})
    del config["train"]["model"]
    job = resolve_job(config)
    assert job.train.model == "./m"


def test_lengths_are_2048_if_no_file_sets_them() -> None:
    job = resolved()
    assert (job.train.sequence_len, job.orch.seq_len, job.infer.max_model_len) == (2048, 2048, 2048)


def test_full_weights_need_no_adapters_in_the_sampler() -> None:
    job = resolved({"train.lora": False})
    assert not job.infer.enable_lora


@pytest.mark.parametrize(
    ("changes", "lora", "enabled"),
    [
        ({}, True, True),
        ({"infer.enable_lora": False}, False, False),
        ({"train.lora": True, "infer.enable_lora": False}, True, False),
        ({"train.lora_target_modules": ["all", "experts"]}, True, False),
        ({"train.lora_target_modules": "experts"}, True, False),
        ({"train.lora_target_modules": ["all", "experts"], "infer.enable_lora": True}, True, True),
        ({"train.lora": False, "train.lora_target_modules": ["experts"]}, False, False),
    ],
)
def test_replicas_take_adapters_where_they_can_serve_them(changes: dict[str, Any], lora: bool, enabled: bool) -> None:
    job = resolved(changes)
    assert (job.train.lora, job.infer.enable_lora) == (lora, enabled)
    settings = read_settings(job)
    assert settings.merge_pushes == (lora and not enabled)
    assert settings.lora_rank == (16 if enabled else 0)


def test_a_replica_without_adapters_has_no_rank_that_could_be_too_small() -> None:
    assert not resolved({"train.lora": True, "infer.enable_lora": False, "infer.max_lora_rank": 4}).infer.enable_lora


@pytest.mark.parametrize(
    ("given", "train", "orch"),
    [
        ({}, "outputs/run_default", "outputs/run_default"),
        ({"train.output_dir": "t"}, "t", "t"),
        ({"orch.output_dir": "o"}, "o", "o"),
        ({"train.output_dir": "t", "orch.output_dir": "o"}, "o", "o"),
    ],
)
def test_one_output_folder(given: dict[str, Any], train: str, orch: str) -> None:
    job = resolved(given)
    assert (job.train.output_dir, job.orch.output_dir) == (train, orch)
    assert len(job.warnings) == (len(given) > 1)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"infer.model": "./n"}, ["infer.model: is './n', and train.model is './m': they must be the same"]),
        ({"orch.model.name": "n"}, ["orch.model.name: is 'n', and train.model is './m': they must be the same"]),
        ({"orch.max_steps": 30}, ["orch.max_steps: is 30, and train.max_steps is 20: they must be the same"]),
        (
            {"train.sequence_len": 64, "orch.seq_len": 128},
            ["orch.seq_len: is 128, and train.sequence_len is 64: they must be the same"],
        ),
        (
            {"train.max_async_level": 0, "orch.max_async_level": 2},
            ["orch.max_async_level: is 2, and train.max_async_level is 0: they must be the same"],
        ),
        (
            {"train.lora_rank": 8, "orch.model.lora_rank": 16},
            ["orch.model.lora_rank: is 16, and train.lora_rank is 8: they must be the same"],
        ),
        (
            {"train.lora_alpha": 8, "orch.model.lora_alpha": 16},
            ["orch.model.lora_alpha: is 16, and train.lora_alpha is 8: they must be the same"],
        ),
        (
            {"train.lora": False, "infer.enable_lora": True},
            ["infer.enable_lora: is true, and train.lora is false: they must be the same"],
        ),
        ({"infer.max_lora_rank": 8}, ["infer.max_lora_rank: is 8, less than train.lora_rank (16)"]),
        ({"infer.max_model_len": 1024}, ["infer.max_model_len: is 1024, less than orch.seq_len (2048)"]),
        (
            {"train.max_steps": None},
            ["train.max_steps: is required, here or as max_steps of orch.yaml: GRPO has no epochs"],
        ),
        ({"train.datasets": [TEXT]}, ["train.datasets: must be empty in GRPO: prompts come from env in orch.yaml"]),
        ({"train.early_stop": True}, ["train.early_stop: is for PT and SFT: a GRPO job ends after max_steps"]),
        (
            {"train.recipe": "fp8_hybrid"},
            ["train.recipe: fp8_hybrid is for PT and SFT: inference would compute otherwise; use bf16"],
        ),
        (
            {"train.adapter_path": "a"},
            [
                "train.adapter_path: cannot be used in GRPO, where sampler and trainer share a base: "
                "merge the adapter into it first"
            ],
        ),
        (
            {"train.loss": {"teacher_tau": 0.5}},
            ["train.loss.teacher_tau: needs a teacher model, which is known, not supported yet: leave it at 0"],
        ),
        (
            {"train.loss": {"type": "grpo", "beta": 0.1}, "train.lora": False},
            [
                "train.loss.beta: needs lora: true, because the reference is the model without its adapter: "
                "leave it at 0"
            ],
        ),
        ({"train.rollouts_per_example": 8}, ["train.rollouts_per_example: unknown key: it belongs in orch.yaml"]),
        ({"orch.model": "m"}, ["orch.model: must be a mapping (lines of `key: value`), got 'm'"]),
        (
            {"train.learning_rate": -1, "infer.tp": 0, "orch.batch_size": 100},
            [
                "train.learning_rate: must be 0 or more, got -1",
                "infer.tp: must be 1 or more, got 0",
                "orch.batch_size: must be a multiple of rollouts_per_example (8), got 100",
            ],
        ),
    ],
)
def test_files_that_disagree(changes: dict[str, Any], messages: list[str]) -> None:
    assert refusals(grpo(changes)) == messages


def test_equal_values_agree_however_they_are_spelled() -> None:
    job = resolved({"infer.model": "m/", "orch.max_steps": 20.0, "infer.dtype": "fp32", "train.torch_dtype": "float32"})
    assert job.warnings == []


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (
            {"train.lora_dropout": 0.1},
            "train.lora_dropout: is 0.1, and 0 is used: in GRPO the policy that is trained must be the one that was "
            "sampled",
        ),
        (
            {"train.torch_dtype": "float32", "infer.dtype": "bfloat16"},
            "infer.dtype: is 'bfloat16', and train.torch_dtype is 'float32': sampler and trainer compute in different "
            "precisions, so their logprobs differ",
        ),
        (
            {"train.system": "Be brief."},
            "train.system: has no effect in GRPO, whose prompts and answers are not those of datasets",
        ),
        (
            {"train.use_cuda_graphs": True},
            "train.use_cuda_graphs: has no effect here: it tunes an engine that this is not",
        ),
        (
            {"orch.client": {"skip_model_check": True}},
            "orch.client.skip_model_check: has no effect here: it tunes an engine that this is not",
        ),
        (
            {"train.distributed": {"ray_address": "auto"}},
            "train.distributed.ray_address: has no effect here: it tunes an engine that this is not",
        ),
    ],
)
def test_warnings_come_once(changes: dict[str, Any], warning: str) -> None:
    assert resolved(changes).warnings == [warning]


@pytest.mark.parametrize(
    ("config", "messages"),
    [
        ({}, ["kind: must be one of pt, sft, grpo; got null"]),
        ({"kind": "gpro"}, ["kind: must be one of pt, sft, grpo; got 'gpro'; did you mean `grpo`?"]),
        (
            {"kind": "pt", "train": nested(30)},
            ["train.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a: is nested more than 24 deep"],
        ),
        ({"kind": "pt"}, ["train: is required for a pt job: the keys of train.yaml"]),
        ({"kind": "pt", "train": []}, ["train: must be a mapping, the keys of train.yaml; got []"]),
        (
            {"kind": "sft", "train": {"model": "m"}, "orch": {}},
            ["orch: is no part of a sft job, which has train"],
        ),
        (
            {"kind": "sft", "train": {"model": "m"}, "cluster": []},
            ["cluster: must be a block: the keys of cluster.yaml"],
        ),
        (
            {"kind": "grpo", "train": {"model": "m"}},
            [
                "infer: is required for a grpo job: the keys of infer.yaml",
                "orch: is required for a grpo job: the keys of orch.yaml",
            ],
        ),
        ({"kind": "pt", "train": {"model": "m"}}, ["train.datasets: must have an entry: pt learns from data"]),
        ({"kind": "pt", "train": {"datasets": [TEXT]}}, ["train.model: is required"]),
        (
            {"kind": "pt", "train": {"model": "m", "datasets": [TALK]}},
            ["train.datasets.0.type: is conversation, and a pt job takes text, auto"],
        ),
        (
            {"kind": "sft", "train": {"model": "m", "datasets": [TALK], "validation_datasets": [TEXT]}},
            ["train.validation_datasets.0.type: is text, and a sft job takes instruction, conversation, auto"],
        ),
    ],
)
def test_jobs_that_are_no_jobs(config: dict[str, Any], messages: list[str]) -> None:
    assert refusals(config) == messages


def test_messages_have_file_and_line_where_they_are_known() -> None:
    train = parse_yaml("model: m\ndatasets:\n  - path: a\n    type: text\nlearning_rate: -1\n", "train.yaml")
    with pytest.raises(ConfigError) as caught:
        resolve_job({"kind": "pt", "train": train.data}, sources={"train": train})
    assert str(caught.value) == "train.yaml:5: train.learning_rate: must be 0 or more, got -1"
    assert [item.field for item in caught.value.violations] == ["train.learning_rate"]


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "pt", "train": {"model": "m", "datasets": [TEXT], "final_lr_fraction": 0.5}},
        {"kind": "sft", "train": {"model": "m", "datasets": [TALK], "lora": False}},
        grpo(),
        grpo({"train.loss": {"type": "cispo"}, "train.save_steps": 0, "infer.dtype": "bfloat16"}),
        grpo({"orch.eval": {"env": [{"id": "e", "address": "h:1", "tls": True}]}, "train.lora": False}),
        grpo({"orch.sampling.temp_scheduler": {"start_temperature": 1, "end_temperature": 0.5}}),
    ],
)
def test_a_resolved_job_resolves_to_itself(config: dict[str, Any]) -> None:
    job = resolve_job(config)
    again = resolve_job(through_struct(job.to_dict()))
    assert again == job
    assert again.to_dict() == job.to_dict()
    assert resolve_job(through_struct(config)) == job


floats = st.floats(min_value=0, max_value=1e6, allow_subnormal=False)


@pytest.mark.parametrize("scaling", ["yarn", '{"rope_type": "yarn"}', {"type": "yarn"}])
def test_both_sides_stretch_rotations_to_one_length(scaling: Any) -> None:
    changes = {"train.rope_scaling": scaling, "train.max_model_len": 8192, "orch.seq_len": 2048}
    job = resolve_job(grpo(changes))
    assert job.train.rope_scaling == job.infer.rope_scaling == {"rope_type": "yarn", "max_model_len": 8192}
    assert job.infer.max_model_len == 2048


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "train.learning_rate": floats,
            "train.weight_decay": floats,
            "train.warmup_ratio": st.floats(0, 1),
            "train.adamw_beta2": st.floats(0, 1, exclude_max=True),
            "train.adamw_epsilon": st.floats(1e-30, 1),
            "train.lora_rank": st.integers(1, 512),
            "train.train_seed": st.integers(0, 2**32 - 1),
            "train.sequence_len": st.integers(2, 2**20),
            "train.lora": st.booleans(),
            "train.lr_scheduler_type": st.sampled_from(["linear", "cosine", "wsd", "constant"]),
            "train.run_name": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1),
            "train.loss": st.sampled_from([{}, {"type": "gspo"}, {"geo_mask_low": 0.5}, {"kl_tau": 0.1}]),
            "infer.dp": st.integers(1, 64),
            "orch.sampling.temperature": st.floats(0.01, 2),
            "orch.batch_size": st.integers(1, 100).map(lambda groups: groups * 8),
            "orch.env": st.just([{"id": "x", "args": {"n": 1, "f": 0.5, "s": "1", "l": [1, True, None]}}]),
        },
    )
)
def test_any_job_resolves_to_itself_through_a_struct(changes: dict[str, Any]) -> None:
    job = resolve_job(grpo(changes))
    assert resolve_job(through_struct(job.to_dict())) == job
    assert resolve_job(through_struct(grpo(changes))) == job


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(
    [
        f"{part}.{key}"
        for part, key in [
            ("train", "learning_rate"),
            ("train", "datasets"),
            ("train", "loss"),
            ("train", "lora"),
            ("train", "max_steps"),
            ("train", "model"),
            ("train", "rope_scaling"),
            ("train", "report_to"),
            ("train", "distributed"),
            ("infer", "model"),
            ("infer", "dtype"),
            ("infer", "enable_lora"),
            ("infer", "rope_scaling"),
            ("orch", "model"),
            ("orch", "env"),
            ("orch", "sampling"),
            ("orch", "eval"),
            ("orch", "seq_len"),
            ("orch", "ckpt"),
            ("orch", "buffer"),
            ("orch", "filters"),
            ("orch", "advantage"),
            ("orch", "client"),
        ]
    ]
)


@given(st.dictionaries(keys, json_values, max_size=4))
def test_any_value_is_taken_or_refused_by_name(changes: dict[str, Any]) -> None:
    try:
        resolve_job(grpo(changes))
    except ConfigError as error:
        assert error.violations
        assert all(item.field.partition(".")[0] in ("train", "infer", "orch") for item in error.violations)


def test_trackers_need_the_metrics_file() -> None:
    page = (Path(__file__).parents[3] / "docs" / "tracking.md").read_text(encoding="utf-8")
    train, orch = (parse_yaml(block, "page").data for block in re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL))
    parts = {
        "train": {"model": "m", "max_steps": 1, "optimizer": "adamw", **train},
        "infer": {},
        "orch": {"env": [{"id": "e"}], "rollouts_per_example": 2, "batch_size": 2, **orch},
    }
    job = resolve_job({"kind": "grpo", **parts})
    assert job.train.report_to == ["tensorboard", "wandb", "mlflow"]
    with pytest.raises(ConfigError, match=r"orch\.dump_metrics: must be true with report_to"):
        resolve_job({"kind": "grpo", **parts, "orch": {**parts["orch"], "dump_metrics": False}})


@pytest.mark.parametrize(
    ("key", "value", "most"),
    [
        ("batch_size", 2**53, 1048576),
        ("rollouts_per_example", 2048, 1024),
        ("max_async_level", 2**53, 1024),
        ("refill_rounds", 2**53, 10000),
        ("seq_len", 2**25, 2**24),
        ("oversampling_factor", 1e300, 100),
        ("sampling", {"temperature": 2.5}, 2),
        ("client", {"timeout": 1e10}, 1000000),
    ],
)
def test_numbers_that_no_job_can_live_up_to_are_refused(key: str, value: Any, most: int) -> None:
    config = {
        "kind": "grpo",
        "train": {"model": "m", "max_steps": 1},
        "infer": {},
        "orch": {"env": [{"id": "reverse-text"}], "rollouts_per_example": 4, key: value},
    }
    name = ".".join(["orch", key, *(value if isinstance(value, dict) else [])])
    with pytest.raises(ConfigError) as caught:
        resolve_job(config)
    assert [violation.field for violation in caught.value.violations] == [name]
    assert f"must be {most} or less" in str(caught.value)


def test_a_folder_that_is_refused_is_said_of_the_file_that_names_it() -> None:
    orch = {"env": [{"id": "reverse-text"}], "rollouts_per_example": 4, "output_dir": "/"}
    with pytest.raises(ConfigError) as caught:
        resolve_job({"kind": "grpo", "train": {"model": "m", "max_steps": 1}, "infer": {}, "orch": orch})
    assert [violation.field for violation in caught.value.violations] == ["orch.output_dir"]
