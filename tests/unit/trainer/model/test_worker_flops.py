"""The operations of a step, against what torch counts while it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MixtralConfig

from surogate.config.train import TrainConfig
from tests.helpers.models.tiny import make_tiny_model
from trainer_svc.worker.device.flops import StepFlops, device_peak
from trainer_svc.worker.device.usage import DeviceUse

TOKENS = 64


def counted(model: Any) -> float:
    """What a forward and a backward pass of one sequence take, without attention."""
    model.get_input_embeddings().requires_grad_(True)  # the first layer's input has a gradient, as all others' have
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.randint(4, 200, (1, TOKENS)), use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if operation in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("frozen", [False, True])
def test_products_are_those_that_torch_counts(frozen: bool) -> None:
    model = make_tiny_model(hidden=64, layers=2, tie_word_embeddings=False)
    model.requires_grad_(not frozen)
    flops = StepFlops(model).of([TOKENS], TOKENS)
    pairs = TOKENS * (TOKENS + 1) / 2
    attention = 12 * 2 * 32 * 2 * pairs  # heads, their size, layers
    assert flops - attention == counted(model)


def test_a_token_that_learns_nothing_needs_no_logits() -> None:
    model = make_tiny_model(hidden=64, layers=2, vocab_size=300)
    flops = StepFlops(model)
    assert flops.of([TOKENS], TOKENS) - flops.of([TOKENS], TOKENS // 2) == 6 * 64 * 300 * TOKENS / 2


def test_of_experts_those_count_that_a_token_goes_through() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=97, num_local_experts=4, num_experts_per_tok=1)
    one = StepFlops(AutoModelForCausalLM.from_config(config)).of([TOKENS], TOKENS)
    config.num_experts_per_tok = 2
    two = StepFlops(AutoModelForCausalLM.from_config(config)).of([TOKENS], TOKENS)
    assert two - one == 6 * (3 * 32 * 64) * TOKENS


def test_a_cpu_has_no_published_peak() -> None:
    assert device_peak(torch.device("cpu")) is None


def test_mfu_is_of_the_peak_that_is_given_and_of_all_devices() -> None:
    model = make_tiny_model(hidden=64, layers=2)
    train = TrainConfig.model_validate({"model": "m", "peak_tflops": 2.0})
    (one,) = DeviceUse(model, train, world_size=1).of_step(100, [TOKENS], TOKENS, seconds=0.5).items()
    assert one == ("mfu", StepFlops(model).of([TOKENS], TOKENS) / 0.5 / 2e12)
    assert DeviceUse(model, train, world_size=2).of_step(100, [TOKENS], TOKENS, 0.5)["mfu"] == one[1] / 2


def test_on_a_cpu_without_a_peak_nothing_is_reported() -> None:
    train = TrainConfig.model_validate({"model": "m"})
    assert DeviceUse(make_tiny_model(hidden=64, layers=2), train, world_size=1).of_step(100, [9], 8, 1.0) == {}
