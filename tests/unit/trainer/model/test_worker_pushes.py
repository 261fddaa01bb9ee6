"""Pushes of merged weights: when they are chosen, and that they are W + s·B·A, computed in float32 and rounded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from surogate.errors import ConfigError
from surogate.v1 import weights_pb2
from tests.helpers.models.architectures import make_model, make_mxfp4_model
from tests.helpers.models.engine import open_engine
from trainer_svc.worker.engine import Engine

LORA, FULL, DELTA = weights_pb2.WEIGHT_KIND_LORA, weights_pb2.WEIGHT_KIND_FULL, weights_pb2.WEIGHT_KIND_DELTA
TRAIN = {"sequence_len": 96, "max_steps": 2, "lora_rank": 8, "lora_alpha": 16}
EXPERTS, EMBEDDING = ["q_proj", "experts"], ["q_proj", "embed_tokens"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose weights are bfloat16's, so that nothing is lost where they are loaded as such."""
    path = tmp_path_factory.mktemp("models")
    for name in ("llama", "phi3", "qwen3", "qwen3-moe", "gpt-oss"):
        make_model(name, path / name)
        rounded = AutoModelForCausalLM.from_pretrained(path / name, dtype=torch.bfloat16).float()
        rounded.save_pretrained(path / name)
    return path


def opened(folder: Path, out: Path, name: str, merge: bool = False, **keys: Any) -> tuple[Engine, list[str]]:
    """An engine whose adapters add something everywhere, and what it said."""
    train = {**TRAIN, "model": str(folder / name), **keys}
    engine, reporter = open_engine("grpo", out, train, merge_pushes=merge)
    torch.manual_seed(1)
    for weight in engine.session.policy.trainable().values():
        torch.nn.init.normal_(weight, std=0.05)
    return engine, reporter.warnings


@pytest.mark.parametrize(
    ("name", "keys", "merge", "kind", "why"),
    [
        ("llama", {}, False, LORA, ""),
        ("llama", {"lora_target_modules": ["all", "lm_head"]}, False, LORA, ""),
        ("llama", {}, True, DELTA, "as infer.enable_lora is false"),
        (
            "llama",
            {"lora_target_modules": EMBEDDING},
            False,
            DELTA,
            "as lora_target_modules names embed_tokens, an emb",
        ),
        ("llama", {"lora": False}, False, FULL, ""),
        ("qwen3-moe", {}, False, LORA, ""),
        ("qwen3-moe", {"lora_target_modules": EXPERTS}, False, DELTA, "as lora_target_modules names experts"),
        ("gpt-oss", {"lora_target_modules": EXPERTS}, True, DELTA, "as lora_target_modules names experts"),
    ],
)
def test_weights_are_merged_where_replicas_take_no_adapters_and_it_is_said_why(
    folder: Path, tmp_path: Path, name: str, keys: dict[str, Any], merge: bool, kind: int, why: str
) -> None:
    engine, said = opened(folder, tmp_path, name, merge, **keys)
    merged = [text for text in said if text.startswith("inference is given merged weights after each step")]
    assert len(merged) == bool(why) and all(why in text for text in merged)
    manifest = engine.export_weights(3, str(tmp_path)).manifest
    assert (manifest.kind, manifest.version, manifest.base_version) == (kind, 3, 0)
    assert bool(manifest.adapter_config_json) == (kind == LORA)


@pytest.mark.parametrize("lora_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("llama", EMBEDDING),
        ("phi3", ["all"]),
        ("qwen3", ["all"]),
        ("qwen3-moe", ["all", "experts"]),
        ("gpt-oss", EXPERTS),
    ],
)
def test_what_is_pushed_is_the_sum_in_float64_rounded_once_and_nothing_else(
    folder: Path, tmp_path: Path, name: str, modules: list[str], lora_dtype: str
) -> None:
    keys: dict[str, Any] = {"lora_target_modules": modules, "lora_dtype": lora_dtype}
    engine, _ = opened(folder, tmp_path, name, True, torch_dtype="bfloat16", **keys)
    engine.checkpoint(final=True)
    pushed = load_file(engine.export_weights(1, str(tmp_path)).path)

    plain = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64)
    before = as_stored(plain, tmp_path / "plain")
    adapted = PeftModel.from_pretrained(plain, tmp_path, autocast_adapter_dtype=False).double()
    exact = as_stored(adapted.merge_and_unload(), tmp_path / "merged")
    assert set(pushed) == {weight for weight, value in exact.items() if not torch.equal(value, before[weight])}
    for weight, value in pushed.items():
        assert value.dtype == torch.bfloat16
        half_a_place = 2.0 ** (torch.frexp(exact[weight])[1] - 9)
        error = (value.double() - exact[weight]).abs()
        assert bool((error <= half_a_place * 1.001 + 1e-7).all()), weight


def as_stored(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The weights as a checkpoint has them."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_over_a_quantised_base_it_comes_with_what_its_weights_mean(folder: Path, tmp_path: Path) -> None:
    engine, _ = opened(folder, tmp_path, "qwen3-moe", True, lora_target_modules=EXPERTS, qlora_bnb=True)
    base = load_file(engine.export_weights(0, str(tmp_path)).path)
    pushed = load_file(engine.export_weights(1, str(tmp_path)).path)
    loaded = load_file(folder / "qwen3-moe" / "model.safetensors")
    other = {weight for weight, value in base.items() if not torch.equal(value, loaded[weight])}
    assert other and other <= set(pushed), "replicas need not have been given the base for it to be whole"
    same = {weight for weight in other if torch.equal(pushed[weight], base[weight])}
    assert same == {weight for weight in other if "q_proj" not in weight}
    assert {weight for weight in set(pushed) - other if "experts" not in weight} == set()


def test_a_checkpoint_in_mxfp4_takes_no_merged_weights(tmp_path: Path) -> None:
    make_mxfp4_model(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"train\.model: is stored in mxfp4, and replicas .* names experts\); name a"):
        opened(tmp_path, tmp_path / "out", "model", lora_target_modules=EXPERTS)
