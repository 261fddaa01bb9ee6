"""Logprobs of given tokens: against float64, in chunks, at temperatures."""

from __future__ import annotations

import pytest
import torch

from trainer_svc.worker.logprobs import logprobs as module
from trainer_svc.worker.logprobs.logprobs import token_logprobs

M, E, V = 50, 16, 31


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(M, E, requires_grad=True)
    return hidden, torch.nn.Linear(E, V, bias=False), torch.randint(0, V, (M,)), torch.rand(M) + 0.5


def test_agree_with_float64(inputs: tuple[torch.Tensor, torch.nn.Linear, torch.Tensor, torch.Tensor]) -> None:
    hidden, head, targets, temperature = inputs
    found, entropy = token_logprobs(hidden, head, targets, temperature, vocab_size=V, with_entropy=True)
    logits = hidden.double() @ head.weight.double().T / temperature.double()[:, None]
    expected = logits.log_softmax(-1)
    picked = expected[torch.arange(M), targets]
    torch.testing.assert_close(found.double(), picked, rtol=1e-6, atol=1e-6)
    assert entropy is not None
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).sum(-1), rtol=1e-6, atol=1e-6)


def test_chunks_change_neither_values_nor_gradients(
    inputs: tuple[torch.Tensor, torch.nn.Linear, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head, targets, temperature = inputs
    weights = torch.randn(M)
    results = []
    for elements in (1 << 24, 7 * V):
        monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", elements)
        found, entropy = token_logprobs(hidden, head, targets, temperature, vocab_size=V, with_entropy=True)
        gradients = torch.autograd.grad((found * weights).sum(), [hidden, head.weight])
        results.append((found, entropy, *gradients))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-5, atol=1e-6)


def test_at_least_as_many_chunks_as_asked_for(
    inputs: tuple[torch.Tensor, torch.nn.Linear, torch.Tensor, torch.Tensor],
) -> None:
    hidden, head, targets, _ = inputs
    calls = []
    with torch.no_grad():
        token_logprobs(hidden, lambda x: calls.append(len(x)) or head(x), targets, vocab_size=V, chunks=4)
    assert calls == [13, 13, 13, 11]


def test_impossible_tokens_leave_the_entropy_finite() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 0.0]])
    _, entropy = module.logprobs_of(logits, torch.tensor([0]), with_entropy=True)
    assert entropy is not None
    assert entropy.item() == pytest.approx(0.6931472)
