"""`recipe: nvfp4` in training, its products emulated: losses, layers left out, resuming, recomputing, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from surogate.config.train import TrainConfig
from surogate.errors import ConfigError
from tests.helpers.models.engine import KeepingReporter, open_engine
from tests.helpers.models.tiny import make_tiny_model
from tests.helpers.trainer.rank_program import emulated_recipe
from trainer_svc.worker.engine import Engine
from trainer_svc.worker.model import recipe
from trainer_svc.worker.nvfp4.linear import Nvfp4Linear
from trainer_svc.worker.nvfp4.operand import Operand
from trainer_svc.worker.nvfp4.product import exact
from trainer_svc.worker.nvfp4.proof import ODD, fault_of

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tiny_model(path, std=0.05, dtype="bfloat16")
    rows = [json.dumps({"text": f"{n} sheep and {n + 1} goats"}) for n in range(200)]
    (path / "data.jsonl").write_text("\n".join(rows))
    return path


def keys_of(folder: Path, **keys: Any) -> dict[str, Any]:
    return {
        "model": str(folder), "datasets": [{"path": str(folder / "data.jsonl"), "type": "text"}], "sequence_len": 128,
        "lora": False, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "torch_dtype": "bfloat16",
        "max_steps": STEPS, "learning_rate": 2e-3, "validation_split_ratio": 0, "lora_rank": 8, "lora_dropout": 0.0,
        "recipe": "nvfp4", "recompute": False, **keys,
    }  # fmt: skip


def opened(out: Path, keys: dict[str, Any], reporter: KeepingReporter | None = None) -> tuple[Engine, KeepingReporter]:
    with emulated_recipe():
        return open_engine("pt", out, keys, reporter)


def losses(out: Path, keys: dict[str, Any]) -> list[float]:
    engine, reporter = opened(out, keys)
    engine.run()
    return reporter.losses


@pytest.mark.parametrize(
    "keys", [{"lora": False}, {"lora": False, "master_dtype": "bf16"}, {"lora": True, "lora_dropout": 0.1}], ids=str
)
def test_losses_follow_those_of_bfloat16(folder: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    engine, reporter = opened(tmp_path / "nvfp4", keys_of(folder, **keys))
    model = engine.session.policy.model
    before = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    engine.run()
    plain = losses(tmp_path / "bf16", keys_of(folder, **keys, recipe="bf16"))
    assert reporter.losses == pytest.approx(plain, rel=0.03)
    assert reporter.losses != plain
    assert reporter.losses[-1] < 0.9 * reporter.losses[0]
    assert bool(before) == keys["lora"]
    for name, weight in before.items():
        assert torch.equal(model.get_parameter(name), weight) and model.get_parameter(name).grad is None
    # Nothing is kept beside the weights of the model or the adapter.
    files = [next((tmp_path / name).glob("*model.safetensors")) for name in ("nvfp4", "bf16")]
    assert load_file(files[0]).keys() == load_file(files[1]).keys()


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_gives_the_losses_of_an_unbroken_one(folder: Path, tmp_path: Path, lora: bool) -> None:
    keys = keys_of(folder, lora=lora, max_steps=6)
    whole = losses(tmp_path / "whole", keys)
    engine, first = opened(tmp_path / "cut", keys, KeepingReporter(stop_after=3))
    engine.run()
    engine.stop(save=True)
    second = losses(tmp_path / "cut", keys)
    assert first.losses + second == whole


@pytest.mark.parametrize("recompute", [True, "selective"])
def test_recomputing_gives_the_same_losses(folder: Path, tmp_path: Path, recompute: bool | str) -> None:
    kept = losses(tmp_path / "kept", keys_of(folder, max_steps=4))
    assert losses(tmp_path / "again", keys_of(folder, max_steps=4, recompute=recompute)) == kept


def test_evaluation_changes_no_loss(folder: Path, tmp_path: Path) -> None:
    plain = losses(tmp_path / "plain", keys_of(folder, max_steps=4, validation_split_ratio=0.2, eval_steps=100))
    assert losses(tmp_path / "more", keys_of(folder, max_steps=4, validation_split_ratio=0.2, eval_steps=1)) == plain


def converted(model: Any, **keys: Any) -> set[str]:
    train = TrainConfig.model_validate({"model": "m", "recipe": "nvfp4", "lora": False, **keys})
    recipe.use_recipe(model, train, emulate=True)
    return {name for name, layer in model.named_modules() if isinstance(layer, Nvfp4Linear)}


def linear_layers(model: torch.nn.Module) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}


def test_the_layers_that_are_skipped_and_the_head_are_left_as_they_are() -> None:
    model = make_tiny_model(layers=4, tie_word_embeddings=False)
    names, weights = linear_layers(model), set(model.state_dict())
    inside = {name for name in names if "layers.1." in name or "layers.2." in name}
    assert "lm_head" in names and len(inside) == 14
    assert converted(model, skip_quant_first_layers=1, skip_quant_last_layers=1) == inside
    assert set(model.state_dict()) == weights


def test_layers_whose_sides_are_no_multiples_of_32_are_left_as_they_are() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=112, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    assert {name.rsplit(".")[-1] for name in converted(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    config.hidden_size = config.intermediate_size = 80
    config.head_dim = 40
    with pytest.raises(ConfigError, match=r"train\.recipe: is nvfp4, and no linear layer .* multiples of 32; use re"):
        converted(LlamaForCausalLM(config))


def no_matrix_scale(a: Operand, b: Operand, dtype: torch.dtype) -> torch.Tensor:
    return exact(Operand(a.codes, a.scales, torch.ones(())), b, dtype)


@pytest.mark.parametrize(
    ("capability", "product", "words"),
    [
        (
            (9, 0),
            exact,
            r"needs a GPU of compute capability 10.0 or above \(Blackwell\), and training is on Card",
        ),
        ((10, 0), exact, None),
        ((12, 0), exact, None),
        ((10, 0), no_matrix_scale, r"does not compute as it must on Card \(10.0\): x Wᵀ of 333 .* use recipe: bf16"),
    ],
)
def test_a_job_needs_a_blackwell_card_whose_products_are_right(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], product: Any, words: str | None
) -> None:
    monkeypatch.setattr(recipe, "device", lambda train: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "Card")
    monkeypatch.setattr(recipe, "fault_of", lambda by_card, where: fault_of(product, torch.device("cpu")))
    train = TrainConfig.model_validate({"model": "m", "recipe": "nvfp4", "lora": False})
    if words is None:
        recipe.check(train)
        return
    with pytest.raises(ConfigError, match=words):
        recipe.check(train)


def test_products_are_proved_in_the_sizes_of_the_models_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fault(product: Any, where: torch.device, sizes: Any = (ODD,)) -> str | None:
        asked.extend(sizes)
        return fault_of(no_matrix_scale, where, sizes)

    monkeypatch.setattr(recipe, "fault_of", fault)
    train = TrainConfig.model_validate({"model": "m", "recipe": "nvfp4", "lora": False})
    with pytest.raises(ConfigError, match="does not compute as it must on the CPU: x Wᵀ of 512 tokens, 64 inputs"):
        recipe.use_recipe(make_tiny_model(), train)
    assert [sizes[1:] for sizes in asked] == [(64, 32), (64, 64), (64, 128), (128, 64)]
