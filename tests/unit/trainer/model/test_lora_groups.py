"""Adapters that are computed in groups: outputs and gradients are those of PEFT's layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from tests.helpers.models.tiny import make_tiny_model
from trainer_svc.worker.adapters import lora
from trainer_svc.worker.adapters.lora_dropout import draw, draw_for, dropped
from trainer_svc.worker.adapters.lora_float import use_float_layers
from trainer_svc.worker.adapters.lora_groups import AdapterGroups, group_adapters
from trainer_svc.worker.folders.files import write_model

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


class Drawing(torch.nn.Dropout):
    """PEFT's layers with our draws."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * draw(x, self.p) / (1 - self.p) if self.training else x


def give_draws(model: PeftModel) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.lora_dropout["default"] = Drawing(layer.lora_dropout["default"].p)


@pytest.mark.parametrize("make", [qwen3, qwen2])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_of_the_same_draws_dropout_makes_what_peft_s_does(
    make: Callable[[], Any], dtype: torch.dtype, limit: float
) -> None:
    """In bfloat16 the adapters stay float32, which PEFT computes them in: some digits of its gradients are noise."""

    def found(grouped: bool) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
        model, groups = adapted(make, grouped=False, lora_dropout=0.3)
        if dtype == torch.float64:
            model.double()
        for name, weight in model.named_parameters():
            if "lora_" not in name:
                weight.data = weight.data.to(dtype)
        give_draws(model)
        if grouped:
            groups = group_adapters(model)
            assert groups is not None
            groups.refresh()
        torch.manual_seed(7)
        return (*loss_and_gradients(model), torch.get_rng_state())

    loss, gradients, state = found(False)
    same_loss, same_gradients, same_state = found(True)
    assert same_loss == pytest.approx(loss, rel=limit)
    for name, gradient in gradients.items():
        assert (same_gradients[name] - gradient).norm() <= limit * gradient.norm(), name
    assert torch.equal(state, same_state)


def test_dropout_is_drawn_anew_for_each_layer_and_call_and_not_in_evaluation() -> None:
    plain, model = (adapted(qwen3, grouped=way, lora_dropout=0.3)[0] for way in (False, True))
    ids = torch.arange(4, 44)[None]
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
        model.eval(), plain.eval()
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    kept = draw_for(3, torch.ones(500, 64), 0.3)
    parts = [dropped(torch.ones(500, 64), kept, layer) for layer in range(3)]
    assert all(abs(float(part.mean()) - 0.7) < 0.01 for part in parts)
    assert all(abs(float((one * other).mean()) - 0.49) < 0.01 for one, other in itertools.combinations(parts, 2))


def test_what_is_computed_again_is_dropped_again_as_it_was() -> None:
    results = []
    for again in (False, True):
        model, _ = adapted(qwen3, grouped=True, lora_dropout=0.3)
        if again:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": True})
        torch.manual_seed(7)
        results.append(loss_and_gradients(model))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(gradient, results[1][1][name]) for name, gradient in results[0][1].items())


@pytest.mark.parametrize(("grouped", "bytes_an_input"), [(True, 1), (False, 3)])
def test_what_dropout_keeps_takes_a_byte_an_input(grouped: bool, bytes_an_input: int) -> None:
    """Of a group of layers, or of each; a forward pass holds no input that an adapter saw."""
    model, _ = adapted(qwen3, grouped=grouped, lora_dropout=0.3)
    if not grouped:
        use_float_layers(model.get_base_model(), model)
    layer = model.base_model.model.model.layers[0].self_attn
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.data_ptr()] = tensor
        return tensor

    x = torch.randn(1, 50, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [getattr(layer, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    assert all(output.requires_grad for output in outputs)
    assert sum(t.numel() for t in held.values() if t.dtype == torch.uint8) == bytes_an_input * 50 * 64
    of_inputs = [t for t in held.values() if t.shape[-2:] == (50, 64) and t.is_floating_point()]
    assert [t.data_ptr() for t in of_inputs] == [x.data_ptr()]


def test_a_compiler_changes_nothing_about_dropout() -> None:
    results = []
    for compiled in (False, True):
        model, _ = adapted(qwen3, grouped=True, lora_dropout=0.3)
        if compiled:
            for layer in model.base_model.model.model.layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        torch.manual_seed(7)
        results.append(loss_and_gradients(model))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, gradient in results[0][1].items():
        assert (results[1][1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_a_cpu_draws_as_often_as_the_rate_says(rate: float) -> None:
    torch.manual_seed(0)
    kept = torch.stack([draw(torch.empty(999, 1001), rate) for _ in range(2)]).double()
    assert float(kept.mean()) == pytest.approx(1 - rate, abs=2e-3)
    assert float((kept[:, :, :-1] * kept[:, :, 1:]).mean()) == pytest.approx((1 - rate) ** 2, abs=3e-3)
    assert float((kept[0] * kept[1]).mean()) == pytest.approx((1 - rate) ** 2, abs=3e-3)


def test_float_layers_drop_as_peft_s_do() -> None:
    results = []
    for ours in (False, True):
        model, _ = adapted(qwen3, grouped=False, lora_dropout=0.3)
        give_draws(model)
        if ours:
            use_float_layers(model.get_base_model(), model)
        torch.manual_seed(7)
        found = loss_and_gradients(model)
        results.append((*found, model.eval()(torch.arange(4, 44)[None]).logits.detach()))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    for name, gradient in results[0][1].items():
        assert (results[1][1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    torch.testing.assert_close(results[1][2], results[0][2], rtol=1e-5, atol=1e-5)
