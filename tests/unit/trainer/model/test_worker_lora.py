"""Keys of LoRA: what is adapted and trained, adapters on adapters, merging; and embeddings that stay as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Llama4TextConfig, PhimoeConfig

from surogate.errors import ConfigError
from tests.helpers.models.architectures import SIZES
from tests.helpers.models.engine import open_engine
from tests.helpers.models.tiny import make_tiny_adapter, make_tiny_model, make_tiny_tokenizer
from trainer_svc.worker.adapters.given import WEIGHTS_FILE
from trainer_svc.worker.adapters.lora_float import FloatLoraLinear
from trainer_svc.worker.engine import Engine

IDS = torch.arange(4, 60)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora")
    make_tiny_model(path / "model", std=0.1, tie_word_embeddings=False)
    make_tiny_adapter(path / "adapter", path / "model", rank=8, alpha=16)
    (path / "data.jsonl").write_text("\n".join(json.dumps({"text": f"{n} sheep and {n + 1} goats"}) for n in range(60)))
    return path


def opened(folder: Path, out: Path, **keys: Any) -> Engine:
    train = {
        "model": str(folder / "model"), "datasets": [{"path": str(folder / "data.jsonl"), "type": "text"}],
        "sequence_len": 128, "max_steps": 3, "learning_rate": 1e-2, "lora_rank": 8, "lora_alpha": 16,
        "lora_dropout": 0.0, "per_device_train_batch_size": 1,
    }  # fmt: skip
    return open_engine("sft", out, {**train, **keys})[0]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def base(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def test_named_layers_alone_are_adapted(folder: Path, tmp_path: Path) -> None:
    engine = opened(folder, tmp_path, lora_target_modules=["q_proj", "down_proj"])
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in engine.session.policy.trainable()}
    assert adapted == {"q_proj", "down_proj"}
    for names in (["q_prok"], ["v_proj", "q_prok"], ["all", "q_prok"]):
        with pytest.raises(
            ConfigError, match=r"lora_target_modules: names q_prok, and .* no such layer; it has down_proj,"
        ):
            opened(folder, tmp_path, lora_target_modules=names)
    with pytest.raises(ConfigError, match=r"lora_target_modules: Target module Qwen3RMSNorm.* is not supported"):
        opened(folder, tmp_path, lora_target_modules=["input_layernorm"])


def test_layers_beside_all_are_adapted_too(folder: Path, tmp_path: Path) -> None:
    engine = opened(folder, tmp_path, lora_target_modules=["all", "lm_head"], merge_adapter=True)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in engine.session.policy.trainable()}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    engine.run()
    torch.testing.assert_close(logits(base(tmp_path / "merged")), logits(engine.session.policy.model))


@pytest.mark.parametrize("more", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 64}}], ids=["rslora", "alpha"])
def test_an_adapter_of_another_scale_is_merged_and_not_gone_on_with(
    folder: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **more}))
    keys: dict[str, Any] = {"adapter_path": str(tmp_path / "adapter"), "learning_rate": 0.0}
    engine = opened(folder, tmp_path / "merged", **keys)
    expected = logits(PeftModel.from_pretrained(base(folder / "model"), tmp_path / "adapter"))
    torch.testing.assert_close(logits(engine.session.policy.model), expected)
    with pytest.raises(
        ConfigError, match=rf"adapter_init_mode: is trainable, and .* has {next(iter(more))}; set it to"
    ):
        opened(folder, tmp_path / "trained", adapter_init_mode="trainable", **keys)


@pytest.mark.parametrize("name", ["PhiMoE", "Llama4Text"])
def test_routers_that_are_linear_layers_of_their_own_get_no_adapter(folder: Path, tmp_path: Path, name: str) -> None:
    sizes = {key: value for key, value in SIZES.items() if key not in ("head_dim", "bos_token_id")}
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "interleave_moe_layer_step": 1}
    config = {"PhiMoE": PhimoeConfig, "Llama4Text": Llama4TextConfig}[name](**sizes, **more)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    make_tiny_tokenizer(tmp_path / "model")
    keys: dict[str, Any] = {"model": str(tmp_path / "model"), "max_steps": 1}
    engine = opened(folder, tmp_path / "out", **keys)
    assert not [weight for weight in engine.session.policy.trainable() if "router" in weight]
    engine.run()
    with pytest.raises(ConfigError, match=r"lora_target_modules: names router, a \w+Router, which adapters do not fit"):
        opened(folder, tmp_path / "out2", lora_target_modules=["q_proj", "router"], **keys)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_rank_scale_dropout_and_dtype(folder: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    engine = opened(folder, tmp_path, lora_rank=4, lora_alpha=12, lora_dropout=0.25, lora_dtype=name)
    assert {weight.dtype for weight in engine.session.policy.trainable().values()} == {dtype}
    layer: Any = engine.session.policy.model.get_submodule("model.layers.0.mlp.up_proj")
    assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (4, 3.0, 0.25)


def test_float_layers_compute_what_pefts_do(folder: Path, tmp_path: Path) -> None:
    ours = opened(folder, tmp_path, adapter_path=str(folder / "adapter"), adapter_init_mode="trainable").session.policy
    theirs = PeftModel.from_pretrained(base(folder / "model"), folder / "adapter", is_trainable=True)
    kinds = {type(layer) for layer in ours.model.modules() if isinstance(layer, LoraLinear)}
    assert kinds == {FloatLoraLinear}
    found = []
    for model in (ours.model, theirs.get_base_model()):
        out = model(IDS).logits
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        out.square().mean().backward()
        found.append((out.detach(), {name: weight.grad for name, weight in weights.items()}))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    with ours.without_adapter():
        torch.testing.assert_close(logits(ours.model), logits(base(folder / "model")))


def test_a_new_adapter_on_a_merged_one_fits_the_base_that_is_written(folder: Path, tmp_path: Path) -> None:
    engine = opened(folder, tmp_path, adapter_path=str(folder / "adapter"))
    first = logits(PeftModel.from_pretrained(base(folder / "model"), folder / "adapter"))
    torch.testing.assert_close(logits(engine.session.policy.model), first, rtol=1e-4, atol=1e-4)
    engine.run()
    named = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "base")
    second = logits(PeftModel.from_pretrained(base(tmp_path / "base"), tmp_path))
    torch.testing.assert_close(second, logits(engine.session.policy.model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(second, first, atol=1e-2)


def test_an_adapter_that_goes_on_starts_where_it_was(folder: Path, tmp_path: Path) -> None:
    keys = {"adapter_path": str(folder / "adapter"), "adapter_init_mode": "trainable"}
    engine = opened(folder, tmp_path, **keys)
    first = logits(PeftModel.from_pretrained(base(folder / "model"), folder / "adapter"))
    torch.testing.assert_close(logits(engine.session.policy.model), first, rtol=1e-4, atol=1e-4)
    engine.run()
    assert set(load_file(tmp_path / WEIGHTS_FILE)) == set(load_file(folder / "adapter" / WEIGHTS_FILE))
    assert not (tmp_path / "base").exists()
    with pytest.raises(ConfigError, match=r"train\.lora_rank: is 4, and the adapter .* has 8; make them equal"):
        opened(folder, tmp_path / "other", **keys, lora_rank=4)


def test_the_merged_model_computes_what_the_adapter_does(folder: Path, tmp_path: Path) -> None:
    engine = opened(folder, tmp_path, merge_adapter=True)
    engine.run()
    torch.testing.assert_close(
        logits(base(tmp_path / "merged")), logits(engine.session.policy.model), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("keys", "frozen"),
    [
        ({"train_embeddings": False}, {"model.embed_tokens.weight"}),
        ({"train_lm_head": False}, {"lm_head.weight"}),
        ({"train_embeddings": False, "train_lm_head": False}, {"model.embed_tokens.weight", "lm_head.weight"}),
    ],
)
def test_embeddings_and_head_stay_as_they_are(
    folder: Path, tmp_path: Path, keys: dict[str, bool], frozen: set[str]
) -> None:
    engine = opened(folder, tmp_path, lora=False, **keys)
    engine.run()
    before, after = (load_file(path / "model.safetensors") for path in (folder / "model", tmp_path))
    assert {name for name, weight in before.items() if torch.equal(weight, after[name])} == frozen


def test_either_key_freezes_a_matrix_that_is_both(folder: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    engine = opened(folder, tmp_path / "out", model=str(tmp_path / "tied"), lora=False, train_lm_head=False)
    assert "model.embed_tokens.weight" not in engine.session.policy.trainable()
