"""What only a CUDA device has: kernels for packed documents and for the head, compiled layers, recorded passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from surogate.config.train import TrainConfig
from tests.helpers.models.tiny import make_tiny_model
from trainer_svc.worker.adapters import gated  # noqa: F401 - its operations are called by their names
from trainer_svc.worker.logprobs.head_math import logprobs_and_gradient
from trainer_svc.worker.model.attention import Documents, packed_attention
from trainer_svc.worker.model.batch import Document, collate
from trainer_svc.worker.session import TrainingSession, load_session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, by the norm."""
    difference = found.double().cpu() - expected.double().cpu()
    return float(difference.norm() / expected.double().norm())


@pytest.mark.parametrize("lengths", [[5, 300, 17, 1, 130], [256, 256], [1024], [64] * 9], ids=str)
@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("size", [64, 128])
def test_attention_in_half_precision_is_that_of_float32(lengths: list[int], window: int | None, size: int) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    q, k, v = (torch.randn(1, heads, total, size, dtype=torch.bfloat16) for heads in (4, 2, 2))
    weights = torch.randn(1, total, 4, size)

    def output_and_gradients(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        documents = Documents.of(lengths).to(device)
        output, _ = packed_attention(
            torch.nn.Identity(), *inputs, None, sliding_window=window, documents=documents, scaling=size**-0.5
        )
        return [output, *torch.autograd.grad((output * weights.to(device)).sum(), inputs)]

    exact = output_and_gradients(torch.device("cpu"), torch.float32)
    for found, expected in zip(output_and_gradients(CUDA, torch.bfloat16), exact, strict=True):
        assert distance(found, expected) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_of_the_head_gives_what_torch_gives(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(33, 20_001) * 3).to(dtype)
    targets = torch.randint(0, 20_001, (33,))
    logprobs, gradient = logprobs_and_gradient(logits.float().double(), targets)
    targets[5] = -1  # no token
    logprobs[5], gradient[5] = 0, 0
    found, found_gradient = logprobs_and_gradient(logits.to(CUDA), targets.to(CUDA))
    torch.testing.assert_close(found.double().cpu(), logprobs, rtol=1e-5, atol=1e-5)
    assert distance(found_gradient, gradient) < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize(("tokens", "features", "rank"), [(300, 200, 16), (64, 128, 8), (129, 1000, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_of_gate_and_up_gives_what_torch_gives(
    tokens: int, features: int, rank: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    y, low, b, gradient = (
        torch.randn(*shape, dtype=torch.float64).to(dtype)
        for shape in ((tokens, 2 * features), (tokens, 2 * rank), (2 * features, 2 * rank), (tokens, features))
    )
    b[:features, rank:], b[features:, :rank] = 0, 0
    exact = [x.double() for x in (y, low, b, gradient)]
    there = [x.to(CUDA) for x in (y, low, b, gradient)]
    limit = 5e-3 if dtype == torch.bfloat16 else 1e-5
    assert distance(torch.ops.surogate.gated(*there[:3]), torch.ops.surogate.gated(*exact[:3])) < limit
    assert distance(torch.ops.surogate.gated_gradient(*there), torch.ops.surogate.gated_gradient(*exact)) < limit


def test_a_step_without_a_finite_gradient_changes_nothing_on_a_card(tmp_path: Path) -> None:
    loaded = session(tmp_path)
    weights = list(loaded.policy.trainable().values())
    for step, value in enumerate((1.0, float("nan"), float("inf"), 1.0)):
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.grad = torch.full_like(weight, value)
        outcome = loaded.optimizer.step(step)
        moved = any(not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
        assert outcome.applied == moved == (value == 1.0)
    assert {float(value) for name, value in loaded.optimizer.state().items() if name.endswith("|step")} == {2.0}


def session(folder: Path, **keys: Any) -> TrainingSession:
    if not (folder / "model").is_dir():
        make_tiny_model(folder / "model", hidden=128, layers=3, std=0.05, dtype="bfloat16")
    train = TrainConfig.model_validate(
        {
            "model": str(folder / "model"),
            "sequence_len": 256,
            "lora_dropout": 0.0,
            "recompute": False,
            "optimizer": "adamw",
            "max_steps": 4,
            **keys,
        }
    )
    loaded = load_session("sft", train, folder / "out", None)
    loaded.start_optimizer(4)
    return loaded


def documents(lengths: list[int], seed: int) -> list[Document]:
    random = np.random.default_rng(seed)
    return [Document(random.integers(4, 260, n), random.random(n) < 0.7) for n in lengths]


BATCHES = [documents(lengths, seed) for seed, lengths in enumerate([[200, 40, 9], [180, 60, 12], [127], [200, 41, 10]])]


def gradients_of(loaded: TrainingSession, *, recorded: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the batches, and the sum of their gradients."""
    graphs = loaded.policy.graphs() if recorded else None
    assert (graphs is not None) == recorded
    losses = []
    for batch in [*BATCHES, *BATCHES, *BATCHES]:
        packed = collate(batch, block=loaded.policy.block)
        learned = len(packed.targets)
        if graphs is not None:
            losses.append(float(graphs.backward(packed, learned)))
        else:
            loss = -loaded.policy.summed_logprob(packed) / learned
            loss.backward()
            losses.append(float(loss))
    return losses, {name: weight.grad.clone() for name, weight in loaded.policy.trainable().items()}


@pytest.mark.parametrize("keys", [{"lora": True}, {"lora": False}, {"lora": True, "recompute": True}], ids=str)
def test_recorded_passes_give_what_launched_ones_give(tmp_path: Path, keys: dict[str, Any]) -> None:
    launched, expected = gradients_of(session(tmp_path, **keys), recorded=False)
    recorded, found = gradients_of(session(tmp_path, **keys), recorded=True)
    assert recorded == pytest.approx(launched, rel=1e-4)
    for name, gradient in expected.items():
        assert distance(found[name], gradient) < 1e-2 or gradient.norm() < 1e-6, name


def test_recorded_dropout_never_repeats_itself(tmp_path: Path) -> None:
    loaded = session(tmp_path, lora_dropout=0.5)
    for name, weight in loaded.policy.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    graphs = loaded.policy.graphs()
    assert graphs is not None
    losses = {float(graphs.backward(collate(BATCHES[2], block=loaded.policy.block), 100)) for _ in range(5)}
    assert len(losses) == 5
    assert all(weight.grad.isfinite().all() for weight in loaded.policy.trainable().values())


def test_dropout_that_is_recomputed_is_not_recorded(tmp_path: Path) -> None:
    assert session(tmp_path, lora_dropout=0.5, recompute=True).policy.graphs() is None


@pytest.mark.parametrize("lora", [True, False])
def test_a_cuda_device_trains_as_a_cpu_does(tmp_path: Path, lora: bool) -> None:
    exact, expected = gradients_of(
        session(tmp_path, lora=lora, cpu_training=True, torch_dtype="float32"), recorded=False
    )
    found, gradients = gradients_of(session(tmp_path, lora=lora), recorded=True)
    assert found == pytest.approx(exact, rel=2e-3)
    for name, gradient in expected.items():
        assert distance(gradients[name], gradient) < 0.05 or gradient.norm() < 1e-6, name
