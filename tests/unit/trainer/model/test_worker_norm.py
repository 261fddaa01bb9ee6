"""Norms with few passes over memory: outputs and gradients are those of transformers' layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedModel

from tests.helpers.models.tiny import make_tiny_model
from trainer_svc.worker.model.norm import use_few_passes

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 97, "head_dim": 16, "max_position_embeddings": 128}


def replaced(model: PreTrainedModel) -> int:
    return sum("forward" in layer.__dict__ for layer in model.modules())


def with_random_weights(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, mean=1.0, std=0.3)
    return model


def loss_and_gradients(model: PreTrainedModel) -> tuple[float, dict[str, torch.Tensor]]:
    ids = torch.arange(4, 84)[None]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach()), {n: w.grad for n, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("name", "count"), [("qwen3", 9), ("llama", 5)])
def test_losses_and_gradients_are_those_of_transformers(name: str, count: int, frozen: bool) -> None:
    """Of norms of heads too (Qwen3), and where norms are not trained themselves."""
    made = make_tiny_model(hidden=64, std=0.1) if name == "qwen3" else None
    plain = with_random_weights(made or AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, initializer_range=0.1)))
    for weight_name, weight in plain.named_parameters():
        weight.requires_grad_(not frozen or "norm" not in weight_name)
    model = copy.deepcopy(plain)
    use_few_passes(model)
    assert replaced(model) == count
    expected, gradients = loss_and_gradients(plain)
    loss, found = loss_and_gradients(model)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert found.keys() == gradients.keys()
    for weight_name, gradient in gradients.items():
        assert (found[weight_name] - gradient).norm() <= 1e-5 * gradient.norm(), weight_name


def test_a_norm_that_computes_something_else_stays_what_it_is() -> None:
    model = with_random_weights(AutoModelForCausalLM.from_config(Gemma2Config(**SIZES)))  # times 1 + weight
    use_few_passes(model)
    assert replaced(model) == 0


def test_other_formats_are_computed_as_they_were() -> None:
    plain = with_random_weights(make_tiny_model(hidden=64, std=0.1))
    model, ids = copy.deepcopy(plain), torch.arange(4, 44)[None]
    use_few_passes(model)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(model.to(dtype)(ids).logits, plain.to(dtype)(ids).logits)


def test_gradients_may_lie_in_any_order() -> None:
    layer = with_random_weights(make_tiny_model(hidden=64, std=0.1)).model.layers[0].self_attn.q_norm
    x, weights = torch.randn(3, 5, layer.weight.numel()), torch.randn(5, 3, layer.weight.numel())
    results = []
    for _ in range(2):
        given = x.clone().requires_grad_()
        (layer(given.transpose(0, 1)) * weights).sum().backward()
        results.append((given.grad, layer.weight.grad))
        layer.weight.grad = None
        use_few_passes(layer)
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
