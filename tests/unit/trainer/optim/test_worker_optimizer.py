"""Optimisers by name: against torch's and bitsandbytes' own, with clipping, and a gradient that is not finite."""

from __future__ import annotations

import copy

import pytest
import torch

from surogate.config.train import TrainConfig
from trainer_svc.worker.optim.optimizer import Optimizer
from trainer_svc.worker.optim.schedule import Schedule


def train_config(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"model": "m", "optimizer": "adamw", "learning_rate": 0.1, **changes})


@pytest.fixture
def module() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))


def optimizer_of(module: torch.nn.Module, **changes: object) -> Optimizer:
    return Optimizer(dict(module.named_parameters()), train_config(**changes), Schedule("constant", 10))


def give_gradients(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


def test_steps_like_torch_with_decay_on_matrices_alone(module: torch.nn.Sequential) -> None:
    reference = copy.deepcopy(module)
    ours = optimizer_of(module, weight_decay=0.5, max_grad_norm=1.0)
    matrices = [weight for weight in reference.parameters() if weight.dim() == 2]
    vectors = [weight for weight in reference.parameters() if weight.dim() == 1]
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0}], lr=0.1
    )
    for step in range(5):
        give_gradients(module, step)
        give_gradients(reference, step)
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        theirs.step()
        outcome = ours.step(step)
        assert outcome.applied
        assert outcome.grad_norm == pytest.approx(float(norm))
    for a, b in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_zero_turns_clipping_off(module: torch.nn.Sequential) -> None:
    reference = copy.deepcopy(module)
    give_gradients(module, 0)
    give_gradients(reference, 0)
    optimizer_of(module, weight_decay=0, max_grad_norm=0).step(0)
    torch.optim.AdamW(reference.parameters(), lr=0.1, weight_decay=0).step()
    for a, b in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(module: torch.nn.Sequential, bad: float) -> None:
    optimizer = optimizer_of(module)
    give_gradients(module, 0)
    optimizer.step(0)
    before = [weight.detach().clone() for weight in module.parameters()]
    state = optimizer.state()
    give_gradients(module, 1)
    module[0].weight.grad[0, 0] = bad  # type: ignore[index]
    assert not optimizer.step(1).applied
    for a, b in zip(module.parameters(), before, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(value, state[name]) for name, value in optimizer.state().items())


def test_state_goes_out_and_in_by_name(module: torch.nn.Sequential) -> None:
    twin = copy.deepcopy(module)
    first, second = optimizer_of(module), optimizer_of(twin)
    give_gradients(module, 0)
    first.step(0)
    twin.load_state_dict(module.state_dict())
    second.restore(first.state())
    for each in (module, twin):
        give_gradients(each, 1)
    first.step(1)
    second.step(1)
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "0.weight|exp_avg" in first.state()


def large_module() -> torch.nn.Sequential:
    """A matrix whose moments are worth 8 bits, and one whose are not."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 8))


def test_8_bit_moments_are_those_of_bitsandbytes() -> None:
    from bitsandbytes.optim import AdamW8bit

    module, reference = large_module(), large_module()
    ours = optimizer_of(module, optimizer="adamw_8bit", weight_decay=0.5, max_grad_norm=0, learning_rate=1e-2)
    theirs = AdamW8bit([reference[0].weight], lr=1e-2, weight_decay=0.5)
    plain = torch.optim.AdamW([reference[1].weight], lr=1e-2, weight_decay=0.5)
    for step in range(4):
        give_gradients(module, step)
        give_gradients(reference, step)
        assert ours.step(step).applied
        theirs.step()
        plain.step()
    assert torch.equal(module[0].weight, reference[0].weight)
    torch.testing.assert_close(module[1].weight, reference[1].weight, rtol=1e-6, atol=1e-7)
    state = ours.state()
    assert state["0.weight|state1"].dtype == torch.uint8
    assert state["1.weight|exp_avg"].dtype == torch.float32
    assert not any("qmap" in name for name in state)


@pytest.mark.parametrize("kind", ["adamw_8bit", "normuon", "adamw"])
@pytest.mark.parametrize("offload", [False, True])
def test_state_goes_out_and_in_whatever_the_kind(kind: str, offload: bool) -> None:
    module, twin = large_module(), large_module()
    first = optimizer_of(module, optimizer=kind, offload_optimizer=offload)
    second = optimizer_of(twin, optimizer=kind)  # off-loading changes nothing but where the state is
    for step in range(2):
        give_gradients(module, step)
        first.step(step)
    twin.load_state_dict(module.state_dict())
    second.restore({name: value.clone() for name, value in first.state().items()})
    for each in (module, twin):
        give_gradients(each, 2)
    first.step(2)
    second.step(2)
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "normuon"])
def test_stacked_biases_are_vectors(kind: str) -> None:
    """Those of a mixture's experts are [experts, n]: they do not decay, and are not made orthogonal."""
    weights = {"experts.up_proj": (4, 64, 64), "experts.up_proj_bias": (64, 64), "norm.weight": (64,)}
    parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in weights.items()}
    config = train_config(optimizer=kind, weight_decay=0.5, normuon_cautious_wd=False)
    optimizer = Optimizer(parameters, config, Schedule("constant", 10))
    for weight in parameters.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step(0)
    moved = {name for name, weight in parameters.items() if not torch.equal(weight, torch.ones_like(weight))}
    assert moved == {"experts.up_proj"}
