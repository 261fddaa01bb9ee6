"""The NVFP4 linear layer: values and gradients against float64, what is drawn at random, and what is not computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from trainer_svc.worker.nvfp4 import linear
from trainer_svc.worker.nvfp4.linear import Nvfp4Linear, random_hadamard, turned
from trainer_svc.worker.nvfp4.operand import Operand, Weight, rows
from trainer_svc.worker.nvfp4.product import exact

T, I, O = 45, 64, 96  # noqa: E741 - the legend of the code; tokens are no multiple of 16


def made(product: Callable[..., torch.Tensor] = exact, dtype: torch.dtype = torch.float32) -> Nvfp4Linear:
    torch.manual_seed(0)
    return Nvfp4Linear(torch.nn.Linear(I, O, dtype=dtype), product)


def meant(operand: Operand) -> torch.Tensor:
    return operand.unscaled().double() * operand.scale.double()


def given(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_values_and_gradients_are_those_of_the_rounded_matrices() -> None:
    layer, x, dy = made(), given(T, I).requires_grad_(), given(T, O, seed=2)
    y = layer(x)
    weight = meant(Weight.of(layer.weight.detach()).along_in())
    assert distance(y, meant(rows(x.detach())) @ weight.T + layer.bias.double()) < 1e-6
    torch.manual_seed(3)
    y.backward(dy)
    torch.manual_seed(3)  # the same draws: the gradient along rows, the signs, the gradient along tokens
    dx = meant(rows(dy, at_random=True)) @ weight
    turn = random_hadamard(dy.device)
    dweight = meant(rows(turned(dy, turn), at_random=True)) @ meant(rows(turned(x.detach(), turn))).T
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    assert distance(x.grad, dx) < 1e-6
    assert distance(layer.weight.grad, dweight) < 1e-6
    assert distance(layer.bias.grad, dy.sum(0)) < 1e-6
    # And those are near the ones without rounding.
    assert distance(y, x @ layer.weight.T + layer.bias) < 0.16
    assert distance(x.grad, dy @ layer.weight) < 0.25
    assert distance(layer.weight.grad, dy.T @ x) < 0.25


def test_the_gradient_of_what_goes_in_is_right_in_the_mean() -> None:
    layer, dy, times = made(), given(T, O, seed=2), 400
    weight = meant(Weight.of(layer.weight.detach()).along_in())
    total = torch.zeros(T, I, dtype=torch.float64)
    for _ in range(times):
        x = given(T, I).requires_grad_()
        layer(x).backward(dy)
        assert x.grad is not None
        total += x.grad.double()
    single = distance(x.grad, dy.double() @ weight)
    assert distance(total / times, dy.double() @ weight) < 2 * single / times**0.5


def test_hadamards_matrix_is_orthogonal_and_its_signs_are_the_runs() -> None:
    torch.manual_seed(5)
    first, second = random_hadamard(torch.device("cpu")), random_hadamard(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(random_hadamard(torch.device("cpu")), first) and not torch.equal(first, second)
    torch.testing.assert_close(first @ first.T, torch.eye(16), rtol=0, atol=1e-7)
    assert torch.equal(first.abs(), torch.full((16, 16), 0.25))


def test_without_rounding_the_transform_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(Weight):
        @classmethod
        def of(cls, weight: torch.Tensor) -> Weight:
            return cls(weight, weight, weight)

        def along_in(self) -> torch.Tensor:  # type: ignore[override]
            return self.codes

        def along_out(self) -> torch.Tensor:  # type: ignore[override]
            return self.codes.T

    monkeypatch.setattr(linear, "rows", lambda matrix, at_random=False: matrix)
    monkeypatch.setattr(linear, "Weight", Plain)
    layer, x, dy = made(lambda a, b, dtype: a @ b.T), given(T, I).requires_grad_(), given(T, O, seed=2)
    layer(x).backward(dy)
    assert x.grad is not None and layer.weight.grad is not None
    torch.testing.assert_close(x.grad, dy @ layer.weight.detach())
    torch.testing.assert_close(layer.weight.grad, dy.T @ x.detach(), rtol=1e-4, atol=1e-5)


def test_outliers_are_spread_before_the_weights_gradient_is_rounded() -> None:
    x = given(64, I)
    x[3] *= 300
    torch.manual_seed(0)
    turn = random_hadamard(x.device)
    plain, spread = meant(rows(x.T.contiguous())), meant(rows(turned(x, turn)))
    others = torch.arange(64) != 3
    back = (spread.view(I, 4, 16) @ turn.double().T).view(I, 64)
    assert distance(plain[:, others], x.T[:, others]) > 0.2 > distance(spread, turned(x, turn))
    assert distance(back, x.T) < 0.15


class Counted:
    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, a: Operand, b: Operand, dtype: torch.dtype) -> torch.Tensor:
        found = exact(a, b, dtype)
        self.shapes.append(tuple(found.shape))
        return found


@pytest.mark.parametrize(
    ("trained", "wanted", "shapes"),
    [
        (True, True, [(T, O), (T, I), (O, I)]),
        (False, True, [(T, O), (T, I)]),
        (True, False, [(T, O), (O, I)]),
    ],
)
def test_no_gradient_is_computed_that_nobody_wants(trained: bool, wanted: bool, shapes: list[tuple[int, ...]]) -> None:
    product = Counted()
    layer, x = made(product), given(T, I).requires_grad_(wanted)
    layer.weight.requires_grad_(trained)
    layer(x).backward(given(T, O))
    assert product.shapes == shapes
    assert (layer.weight.grad is not None, x.grad is not None) == (trained, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_have_the_format_that_is_computed_in_and_gradients_that_of_the_weight(dtype: torch.dtype) -> None:
    layer, x = made(dtype=dtype), given(3, 15, I).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert (y.dtype, y.shape) == (torch.bfloat16, (3, 15, O))
    y.float().sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    assert (x.grad.dtype, layer.weight.grad.dtype) == (torch.float32, dtype)
    assert made(dtype=dtype)(given(2, I, dtype=dtype)).dtype == dtype


def test_recomputing_gives_the_same_bits_and_no_forward_pass_draws() -> None:
    found = []
    for again in (False, True):
        layer, x = made(), given(T, I).requires_grad_()
        torch.manual_seed(7)
        state = torch.get_rng_state()
        y = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False) if again else layer(x)
        assert torch.equal(torch.get_rng_state(), state)
        y.square().sum().backward()
        assert x.grad is not None and layer.weight.grad is not None
        found.append((y.detach(), x.grad, layer.weight.grad, torch.get_rng_state()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
