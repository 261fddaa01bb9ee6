"""master_dtype, gradient_dtype and recipe: what is kept in which format, and what is refused where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surogate.config.train import TrainConfig
from surogate.errors import ConfigError
from tests.helpers.models.engine import KeepingReporter, open_engine
from tests.helpers.models.tiny import make_counting, make_tiny_model
from trainer_svc.worker.engine import Engine
from trainer_svc.worker.model import modeling, recipe
from trainer_svc.worker.model.precision import Precision
from trainer_svc.worker.optim.narrow import rounded

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_counting(tmp_path_factory.mktemp("model"), hidden=64)


def opened(folder: Path, out: Path, **keys: Any) -> tuple[Engine, KeepingReporter]:
    train = {
        "model": str(folder), "datasets": [{"path": str(folder / "data.jsonl"), "type": "text"}], "sequence_len": 128,
        "lora": False, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "torch_dtype": "bfloat16",
        "max_steps": STEPS, "learning_rate": 2e-3, "validation_split_ratio": 0,
    }  # fmt: skip
    return open_engine("pt", out, {**train, **keys})


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "normuon"])
@pytest.mark.parametrize(
    "keys", [{"master_dtype": "bf16"}, {"gradient_dtype": "bf16"}, {"master_dtype": "bf16", "gradient_dtype": "fp32"}]
)
def test_training_in_narrow_formats_follows_that_in_float32(
    folder: Path, tmp_path: Path, keys: dict[str, str], optimizer: str
) -> None:
    engine, narrow = opened(folder, tmp_path / "narrow", optimizer=optimizer, **keys)
    weights = [*engine.session.policy.trainable().values()]
    kept = {"bf16": torch.bfloat16, "fp32": torch.float32}
    master = kept[keys.get("master_dtype", "fp32")]
    gradient = kept[keys.get("gradient_dtype", keys.get("master_dtype", "fp32"))]
    assert {weight.dtype for weight in weights} == {master}
    run = engine._run
    assert run is not None
    found: set[torch.dtype] = set()
    hooks = [w.register_post_accumulate_grad_hook(lambda w: found.add(w.grad.dtype)) for w in weights]
    engine.run()
    assert found == {gradient}
    assert {weight.dtype for weight in weights} == {master} and all(weight.grad is None for weight in weights)
    del hooks
    engine, wide = opened(folder, tmp_path / "wide", optimizer=optimizer)
    engine.run()
    assert narrow.losses == pytest.approx(wide.losses, rel=0.02)
    assert narrow.losses[-1] < 0.9 * narrow.losses[0]


def test_a_resumed_run_in_bfloat16_gives_the_losses_of_an_unbroken_one(folder: Path, tmp_path: Path) -> None:
    keys = {"master_dtype": "bf16", "gradient_dtype": "fp32"}
    engine, whole = opened(folder, tmp_path / "whole", **keys)
    engine.run()
    engine, first = open_engine("pt", tmp_path / "cut", train_of(engine), KeepingReporter(stop_after=5))
    engine.run()
    engine.stop(save=True)
    engine, second = open_engine("pt", tmp_path / "cut", train_of(engine))
    engine.run()
    assert first.losses + second.losses == whole.losses


def train_of(engine: Engine) -> dict[str, Any]:
    return engine.session.train.model_dump(mode="json", exclude_unset=True)


@pytest.mark.parametrize("lora", [False, True])
def test_a_cpu_without_bfloat16_computes_bfloat16_models_in_float32(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    monkeypatch.setattr(modeling, "has_bfloat16", lambda device: False)
    make_tiny_model(tmp_path / "half", dtype="bfloat16")
    keys = {"model": str(tmp_path / "half"), "lora": lora, "lora_dropout": 0.0}
    losses = []
    for dtype in ("float32", "auto"):
        engine, reporter = opened(folder, tmp_path / dtype, torch_dtype=dtype, max_steps=3, **keys)
        assert {weight.dtype for weight in engine.session.policy.model.parameters()} == {torch.float32}
        engine.run()
        losses.append(reporter.losses)
    assert losses[0] == losses[1]
    (file,) = (tmp_path / "auto").glob("*model.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32 if lora else torch.bfloat16}


def test_a_master_in_bfloat16_stays_so_on_a_cpu_without_it() -> None:
    precision = Precision.of("bfloat16", None, torch.bfloat16, has_bfloat16=False)
    assert (precision.trained, precision.autocast) == (torch.bfloat16, torch.bfloat16)


def test_small_steps_are_not_lost() -> None:
    torch.manual_seed(0)
    value = torch.full((100_000,), 1.0)
    for _ in range(20):
        value = rounded(value + 2**-12).float()  # a sixteenth of the next number's distance
    assert float(value.mean()) == pytest.approx(1 + 20 * 2**-12, abs=1e-4)
    assert torch.equal(rounded(torch.tensor([1.0, -2.5, 0.0])), torch.tensor([1.0, -2.5, 0.0]).bfloat16())


def test_an_adapter_in_bfloat16_has_gradients_in_float32(folder: Path, tmp_path: Path) -> None:
    keys = {"lora": True, "lora_dtype": "bf16", "gradient_dtype": "fp32", "lora_dropout": 0.0, "lora_rank": 4}
    engine, reporter = opened(folder, tmp_path, **keys)
    assert {(w.dtype, w.grad_dtype) for w in engine.session.policy.trainable().values()} == {
        (torch.bfloat16, torch.float32)
    }
    engine.run()
    assert reporter.losses[-1] < reporter.losses[0]


def test_a_master_in_bfloat16_needs_a_model_that_computes_in_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.master_dtype: is bf16, and the model computes in float32"):
        opened(folder, tmp_path, master_dtype="bf16", torch_dtype="auto")


@pytest.mark.parametrize(
    ("name", "needs", "instead"),
    [
        (
            "fp8_hybrid",
            "needs a GPU of compute capability 8.9 or above .* and torchao, and",
            "qlora_fp8",
        ),
        ("nvfp4", r"needs a GPU of compute capability 10.0 or above \(Blackwell\), and", "qlora_fp4"),
    ],
)
def test_recipes_without_their_hardware_are_refused_before_anything_is_read(
    tmp_path: Path, name: str, needs: str, instead: str
) -> None:
    with pytest.raises(ConfigError, match=f"train.recipe: {name} {needs}.*use recipe: bf16, or {instead}: true"):
        opened(tmp_path / "nothing", tmp_path, recipe=name)


@pytest.mark.parametrize(("capability", "fits"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_the_gpu_that_fp8_needs(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fits: bool) -> None:
    monkeypatch.setattr(recipe, "device", lambda train: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "Card")
    train = TrainConfig.model_validate({"model": "m", "recipe": "fp8-hybrid", "lora": False})
    if fits:
        recipe.check(train)
        return
    with pytest.raises(ConfigError, match=r"training is on Card \(8.0\)"):
        recipe.check(train)


def test_fp8_products_by_emulation(folder: Path) -> None:
    from torchao.float8.float8_linear import Float8Linear

    keys = {"model": "m", "recipe": "fp8_hybrid", "lora": False, "skip_quant_first_layers": 1}
    model, plain = make_tiny_model(hidden=64, std=0.1), make_tiny_model(hidden=64, std=0.1)
    recipe.use_recipe(model, TrainConfig.model_validate(keys), emulate=True)
    converted = {name for name, layer in model.named_modules() if isinstance(layer, Float8Linear)}
    linear = {name for name, layer in plain.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert converted == {name for name in linear if "layers.1." in name}
    ids = torch.arange(4, 68)[None]
    losses = []
    for each in (model, plain):
        losses.append(each(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02)
    assert losses[0].item() != losses[1].item()
    for name, weight in model.named_parameters():
        other = plain.get_parameter(name).grad
        assert weight.grad is not None and other is not None
        assert torch.nn.functional.cosine_similarity(weight.grad.flatten(), other.flatten(), dim=0) > 0.9, name
