"""NorMuon against its definition, written out row by row in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from surogate.config.train import TrainConfig
from trainer_svc.worker.optim.normuon import NorMuon, orthogonalised
from trainer_svc.worker.optim.optimizer import Optimizer
from trainer_svc.worker.optim.schedule import Schedule

LR, MOMENTUM, BETA2, DECAY, EPS = 0.02, 0.9, 0.8, 0.1, 1e-8


class Reference:
    """The paper's algorithm for one matrix."""

    def __init__(self, weight: np.ndarray) -> None:
        self.weight = weight.copy()
        self.momentum = np.zeros_like(weight)
        self.square = np.zeros(weight.shape[0])

    def step(self, gradient: np.ndarray, cautious: bool) -> None:
        self.momentum = MOMENTUM * self.momentum + (1 - MOMENTUM) * gradient
        update = newton_schulz(self.momentum)
        rows, columns = update.shape
        for row in range(rows):
            mean_square = sum(value**2 for value in update[row]) / columns
            self.square[row] = BETA2 * self.square[row] + (1 - BETA2) * mean_square
            update[row] /= math.sqrt(self.square[row]) + EPS
        update *= 0.2 * math.sqrt(rows * columns) / np.linalg.norm(update)
        decayed = self.weight * (1 - LR * DECAY)
        self.weight = np.where(update * self.weight >= 0, decayed, self.weight) if cautious else decayed
        self.weight -= LR * update


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """The iteration applied to the singular values, which is what it does."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.linalg.norm(matrix)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ np.diag(values) @ right


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("cautious", [False, True])
def test_steps_as_the_paper_defines_them(shape: tuple[int, int], cautious: bool) -> None:
    generator = np.random.default_rng(0)
    start = generator.normal(size=shape)
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    reference = Reference(start)
    optimizer = NorMuon([weight], lr=LR, momentum=MOMENTUM, beta2=BETA2, weight_decay=DECAY, cautious=cautious, eps=EPS)
    for _ in range(5):
        gradient = generator.normal(size=shape)
        weight.grad = torch.from_numpy(gradient)
        optimizer.step()
        reference.step(gradient, cautious)
    np.testing.assert_allclose(weight.detach().numpy(), reference.weight, rtol=1e-9)


def test_singular_values_come_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(40, 24)))
    assert values.min() > 0.5 and values.max() < 1.3


def test_experts_are_matrices_by_themselves() -> None:
    torch.manual_seed(0)
    stacked = torch.nn.Parameter(torch.randn(3, 4, 6))
    single = [torch.nn.Parameter(part.detach().clone()) for part in stacked]
    stacked.grad = torch.randn(3, 4, 6)
    for weight, gradient in zip(single, stacked.grad, strict=True):
        weight.grad = gradient.clone()
    NorMuon([stacked], lr=LR).step()
    NorMuon(single, lr=LR).step()
    torch.testing.assert_close(stacked, torch.stack(list(single)), rtol=1e-5, atol=1e-6)


def test_embeddings_and_vectors_are_left_to_adamw() -> None:
    weights = {
        "embed.weight": torch.nn.Parameter(torch.randn(8, 4)),
        "layer.weight": torch.nn.Parameter(torch.randn(4, 4)),
        "layer.bias": torch.nn.Parameter(torch.randn(4)),
    }
    train = TrainConfig.model_validate({"model": "m", "optimizer": "normuon"})
    optimizer = Optimizer(weights, train, Schedule("constant", 10), apart=["embed.weight"])
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)
    optimizer.step(0)
    assert {name for name in optimizer.state() if name.startswith("layer.weight")} == {
        "layer.weight|momentum",
        "layer.weight|row_square",
    }
    assert {"embed.weight|exp_avg", "layer.bias|exp_avg"} < set(optimizer.state())
