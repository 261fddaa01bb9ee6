"""Adapters that are computed in groups: outputs and gradients are those of PEFT's layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from tests.helpers.tiny import make_tiny_model
from trainer_svc.worker.adapters import lora
from trainer_svc.worker.adapters.lora_groups import AdapterGroups, group_adapters
from trainer_svc.worker.checkpoints.files import write_model

SMALL = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def qwen3() -> Any:
    return make_tiny_model(hidden=64, std=0.1)


def qwen2() -> Any:
    """With biases on query, key and value."""
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SMALL, initializer_range=0.1))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    return model


def gelu() -> Any:
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, hidden_act="gelu", initializer_range=0.1))


def adapted(make: Callable[[], Any], *, grouped: bool, **keys: Any) -> tuple[PeftModel, AdapterGroups | None]:
    torch.manual_seed(0)
    keys = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.0, "target_modules": "all-linear", **keys}
    model = get_peft_model(make(), LoraConfig(task_type="CAUSAL_LM", **keys))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    groups = group_adapters(model) if grouped else None
    if groups is not None:
        groups.refresh()
    return model, groups


def loss_and_gradients(model: PeftModel) -> tuple[float, dict[str, torch.Tensor]]:
    ids = torch.arange(4, 44)[None]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss), {name: w.grad for name, w in model.named_parameters() if w.requires_grad and w.grad is not None}


@pytest.mark.parametrize("make", [qwen3, qwen2, gelu])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "gate_proj", "up_proj"], ["up_proj", "o_proj"]])
def test_loss_and_gradients_are_those_of_peft(make: Callable[[], Any], targets: Any) -> None:
    expected, gradients = loss_and_gradients(adapted(make, grouped=False, target_modules=targets)[0])
    model, groups = adapted(make, grouped=True, target_modules=targets)
    assert groups is not None
    loss, found = loss_and_gradients(model)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert found.keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_new_weights_count_once_they_are_taken_over_and_the_base_stays_what_it_was() -> None:
    plain, _ = adapted(qwen3, grouped=False)
    model, groups = adapted(qwen3, grouped=True)
    assert groups is not None
    ids = torch.arange(4, 44)[None]
    with torch.no_grad():
        for each in (plain, model):
            for name, weight in each.named_parameters():
                if "lora_" in name:
                    weight.mul_(1.5)
        groups.refresh()
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
        with model.disable_adapter(), plain.disable_adapter():
            torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    states = model.state_dict(), plain.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_bases_that_lie_in_one_matrix_are_written_each_by_itself(tmp_path: Path) -> None:
    ids, logits = torch.arange(4, 44)[None], []
    for grouped in (False, True):
        model = adapted(qwen3, grouped=grouped)[0].get_base_model()
        write_model(model, lora.base_state(model, torch.float32), torch.float32, tmp_path / str(grouped))
        logits.append(AutoModelForCausalLM.from_pretrained(tmp_path / str(grouped))(ids).logits)
    assert torch.equal(*logits)


def test_a_feed_forward_layer_is_asked_whether_it_is_gated_by_silu() -> None:
    def replaced(make: Callable[[], Any]) -> int:
        layers = adapted(make, grouped=True)[0].modules()
        return sum(type(layer.__dict__.get("forward")).__name__ == "_GatedFeedForward" for layer in layers)

    assert (replaced(qwen3), replaced(gelu)) == (2, 0)


def test_members_that_get_different_inputs_compute_each_their_own() -> None:
    plain, grouped = (
        adapted(qwen3, grouped=way)[0].base_model.model.model.layers[0].self_attn for way in (False, True)
    )
    torch.manual_seed(1)
    first, second = torch.randn(2, 1, 5, 64).unbind()
    for name, x in (("q_proj", first), ("k_proj", second), ("v_proj", first), ("v_proj", second), ("q_proj", second)):
        torch.testing.assert_close(getattr(grouped, name)(x), getattr(plain, name)(x), rtol=1e-5, atol=1e-5)


def test_with_dropout_layers_stay_peft_s() -> None:
    assert adapted(qwen3, grouped=True, lora_dropout=0.1)[1] is None
