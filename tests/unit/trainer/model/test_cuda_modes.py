"""Modes of training on a CUDA card that a CPU has too: quantised bases, 8-bit moments, recipes, the driver."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from surogate.config.train import TrainConfig
from surogate.telemetry import metrics as names
from tests.helpers.models.engine import open_engine
from tests.helpers.models.tiny import make_tiny_model
from tests.helpers.trainer.rank_program import emulated_recipe
from trainer_svc.worker.model.batch import Document, collate
from trainer_svc.worker.nvfp4.operand import Operand, Weight, rows
from trainer_svc.worker.nvfp4.product import by_card
from trainer_svc.worker.nvfp4.proof import ODD, fault_of
from trainer_svc.worker.optim.optimizer import Optimizer
from trainer_svc.worker.optim.schedule import Schedule
from trainer_svc.worker.quantized.storage import Fp8, Nf4, Nvfp4, Storage
from trainer_svc.worker.session import load_session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
STORAGES = [Nf4(), Nf4(double_quant=False), Fp8(), Nvfp4()]
QLORA: list[dict[str, Any]] = [{"qlora_bnb": True}, {"qlora_fp8": True}, {"qlora_fp4": True}]


FLAT = Schedule.of("constant", 6, warmup_steps=0, warmup_ratio=0.0, cooldown_steps=0, final_fraction=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder, hidden=128, layers=3, std=0.05, dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{n} sheep and {n + 1} goats on hill {n % 7}"}) for n in range(300)))
    return path


def keys_of(model: Path, texts: Path, **keys: Any) -> dict[str, Any]:
    return {
        "model": str(model), "datasets": [{"path": str(texts), "type": "text"}], "validation_split_ratio": 0,
        "sequence_len": 256, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 12,
        "learning_rate": 2e-3, "lora_rank": 8, "lora_dropout": 0.0, "torch_dtype": "bfloat16", "save_steps": 0,
        "recompute": False, **keys,
    }  # fmt: skip


def losses_of(out: Path, model: Path, texts: Path, **keys: Any) -> list[float]:
    engine, reporter = open_engine("sft", out, keys_of(model, texts, **keys))
    engine.run()
    return reporter.losses


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, by the norm."""
    difference = found.double().cpu() - expected.double().cpu()
    return float(difference.norm() / expected.double().norm())


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("shape", [(384, 256), (96, 80)], ids=str)
def test_a_stored_matrix_means_the_same_on_a_card(storage: Storage, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.02
    parts = storage.encode(weight)
    there = {name: value.to(CUDA) for name, value in parts.items()}
    for dtype in (torch.float32, torch.bfloat16):
        here = storage.decode(parts, torch.Size(shape), dtype)
        assert torch.equal(storage.decode(there, torch.Size(shape), dtype).cpu(), here)
    encoded_there = storage.encode(weight.to(CUDA))
    found = storage.decode(encoded_there, torch.Size(shape), torch.float32)
    assert distance(found, storage.decode(parts, torch.Size(shape), torch.float32)) < 2e-3  # ties, and little else


@pytest.mark.parametrize("keys", QLORA, ids=str)
def test_gradients_over_a_quantised_base_are_those_of_a_cpu(model: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    documents = [Document(random.integers(4, 260, n), np.ones(n, dtype=np.bool_)) for n in (120, 70, 30)]

    def found(**other: Any) -> tuple[float, dict[str, torch.Tensor]]:
        common = {"model": str(model), "sequence_len": 256, "lora_dropout": 0.0, "recompute": False}
        train = TrainConfig.model_validate({**common, **keys, **other})
        policy = load_session("sft", train, tmp_path, None).policy
        generator = torch.Generator().manual_seed(1)
        for name, weight in policy.trainable().items():
            if "lora_B" in name:
                weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
        packed = collate(documents, block=policy.block)
        loss = -policy.summed_logprob(packed) / int((packed.targets >= 0).sum())
        loss.backward()
        return float(loss), {name: weight.grad for name, weight in policy.trainable().items()}

    exact, expected = found(cpu_training=True, torch_dtype="float32")
    loss, gradients = found()
    assert loss == pytest.approx(exact, rel=2e-3)
    for name, gradient in expected.items():
        assert distance(gradients[name], gradient) < 0.05 or gradient.norm() < 1e-6, name


@pytest.mark.parametrize("keys", QLORA, ids=str)
def test_a_quantised_job_runs_on_a_card_as_on_a_cpu(
    model: Path, texts: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    expected = losses_of(tmp_path / "cpu", model, texts, cpu_training=True, **keys)
    found = losses_of(tmp_path / "card", model, texts, **keys)
    assert found == pytest.approx(expected, rel=0.02)
    assert found[-1] < 0.9 * found[0]


@pytest.mark.parametrize("keys", [{"lora": False}, {"lora": False, "offload_optimizer": True}], ids=str)
def test_eight_bit_moments_on_a_card_follow_those_of_a_cpu(keys: dict[str, Any]) -> None:
    train = TrainConfig.model_validate(
        {"model": "m", "optimizer": "adamw_8bit", "learning_rate": 1e-3, "weight_decay": 0.1, **keys}
    )
    torch.manual_seed(0)
    start, gradients = torch.randn(128, 128) * 0.02, [torch.randn(128, 128) for _ in range(6)]

    def trained(device: torch.device) -> torch.Tensor:
        weight = torch.nn.Parameter(start.clone().to(device))
        optimizer = Optimizer({"layer.weight": weight}, train, FLAT)
        for step, gradient in enumerate(gradients):
            weight.grad = gradient.to(device, copy=True)
            assert optimizer.step(step).applied
        state = optimizer.state()
        assert state["layer.weight|state1"].dtype == torch.uint8
        return weight.detach()

    moved = trained(torch.device("cpu")) - start
    assert distance(trained(CUDA).cpu() - start, moved) < 0.05


def test_the_driver_says_how_busy_and_how_warm_a_card_is(model: Path, texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("pynvml")
    engine, reporter = open_engine("sft", tmp_path, keys_of(model, texts, max_steps=4, log_gpu_util=2))
    engine.run()
    for step in (2, 4):
        found = reporter.steps[step]
        assert 0 <= found[names.GPU_UTILIZATION] <= 1
        assert 10 < found[names.GPU_WATTS] < 2000
        assert 5 < found[names.GPU_CELSIUS] < 110
    assert names.GPU_WATTS not in reporter.steps[3]
    assert 0 < reporter.steps[3][names.GPU_BYTES] <= torch.cuda.get_device_properties(CUDA).total_memory


def needs(major: int, minor: int) -> pytest.MarkDecorator:
    fits = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (major, minor)
    return pytest.mark.skipif(not fits, reason=f"needs a GPU of compute capability {major}.{minor} or above")


@needs(8, 9)
@pytest.mark.parametrize("keys", [{"lora": True}, {"lora": False}], ids=str)
def test_fp8_products_train_as_bfloat16_ones(model: Path, texts: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    pytest.importorskip("torchao")
    plain = losses_of(tmp_path / "bf16", model, texts, **keys)
    found = losses_of(tmp_path / "fp8", model, texts, recipe="fp8_hybrid", **keys)
    assert found == pytest.approx(plain, rel=0.03)
    assert found != plain
    assert found[-1] < 0.9 * found[0]


@needs(8, 9)
def test_fp8_products_on_a_card_are_those_of_the_emulation() -> None:
    pytest.importorskip("torchao")
    from trainer_svc.worker.model.recipe import use_recipe

    train = TrainConfig.model_validate({"model": "m", "recipe": "fp8_hybrid", "lora": False})
    ids = torch.arange(4, 68)[None]

    def loss_and_gradients(device: torch.device, emulate: bool) -> tuple[float, dict[str, torch.Tensor]]:
        made = make_tiny_model(hidden=128, std=0.1).to(device, torch.bfloat16)
        use_recipe(made, train, emulate=emulate)
        loss = made(input_ids=ids.to(device), labels=ids.to(device)).loss
        loss.backward()
        return float(loss), {name: weight.grad for name, weight in made.named_parameters()}

    expected, gradients = loss_and_gradients(CUDA, emulate=True)
    loss, found = loss_and_gradients(CUDA, emulate=False)
    assert loss == pytest.approx(expected, rel=5e-3)
    for name, gradient in gradients.items():  # a float8 next to its neighbour is an eighth away: few may be
        assert torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.95, name


@pytest.mark.parametrize("make", [rows, lambda matrix: Weight.of(matrix).along_out()])
def test_rounding_to_nvfp4_on_a_card_is_that_of_a_cpu(make: Callable[[torch.Tensor], Operand]) -> None:
    matrix = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    here, there = make(matrix), make(matrix.to(CUDA))
    assert torch.equal(there.scale.cpu(), here.scale)
    assert torch.equal(there.scales.view(torch.uint8).cpu(), here.scales.view(torch.uint8))
    assert torch.equal(there.codes.cpu(), here.codes)


@pytest.mark.parametrize("lora", [True, False])
def test_emulated_nvfp4_trains_on_a_card_as_bfloat16(model: Path, texts: Path, tmp_path: Path, lora: bool) -> None:
    plain = losses_of(tmp_path / "bf16", model, texts, lora=lora)
    with emulated_recipe():
        found = losses_of(tmp_path / "nvfp4", model, texts, lora=lora, recipe="nvfp4")
    assert found == pytest.approx(plain, rel=0.05)
    assert found[-1] < 0.9 * found[0]


@needs(10, 0)
def test_nvfp4_products_of_a_card_are_exact_but_for_adding_up() -> None:
    assert fault_of(by_card, CUDA, [ODD, (1, 32, 32), (4096, 1024, 3072), (777, 4096, 64)]) is None


@needs(10, 0)
@pytest.mark.parametrize("lora", [True, False])
def test_nvfp4_products_train_as_bfloat16_ones(model: Path, texts: Path, tmp_path: Path, lora: bool) -> None:
    plain = losses_of(tmp_path / "bf16", model, texts, lora=lora)
    found = losses_of(tmp_path / "nvfp4", model, texts, lora=lora, recipe="nvfp4")
    assert found == pytest.approx(plain, rel=0.05)
    assert found != plain
    assert found[-1] < 0.9 * found[0]


def test_the_command_line_trains_on_a_card(model: Path, texts: Path, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    keys = keys_of(model, texts, output_dir=str(tmp_path / "out"), save_steps=6, lora=True)
    config.write_text(json.dumps(keys))  # JSON is YAML
    ran = subprocess.run(
        [sys.executable, "-m", "surogate.cli.main", "pt", str(config)], capture_output=True, text=True, timeout=280
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(math.isfinite(row["loss"]) and row[names.GPU_BYTES] > 0 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "checkpoint-12").is_dir()
