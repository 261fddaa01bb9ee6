"""What is not kept in memory: logits of all tokens, and activations that are recomputed; and that no number changes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from surogate.config.train import TrainConfig
from tests.helpers.models.tiny import VOCAB_SIZE, make_tiny_model
from trainer_svc.worker.logprobs import logprobs as module
from trainer_svc.worker.logprobs.logprobs import summed_logprob, token_logprobs
from trainer_svc.worker.model.attention import use_packed_attention
from trainer_svc.worker.model.batch import Document, PackedBatch, collate
from trainer_svc.worker.model.policy import Policy
from trainer_svc.worker.model.precision import Precision
from trainer_svc.worker.model.recompute import use_recompute

M, E, V = 50, 16, 31
HIDDEN = 64
"""Hidden size of the tiny model."""


class Sizes(TorchDispatchMode):
    """Keeps the shape of every tensor that is made, and those of products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.products: list[tuple[int, ...]] = []

    def most_logits(self, hidden: int) -> int:
        """Rows of the largest tensor [m, V], the transposed embedding aside."""
        return max(shape[0] for shape in self.shapes if shape[1:] == (VOCAB_SIZE,) and shape[0] != hidden)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(leaf.shape) for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)}
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.default):
            self.products.append(tuple(found.shape))
        return found


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Bytes of each tensor that autograd keeps for the backward pass."""
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def tiny_policy(recompute: Any = False, *, chunks: int = 1, lora: bool = False) -> Policy:
    model = make_tiny_model(layers=2, std=0.1)
    use_packed_attention(model)
    if lora:
        model.requires_grad_(False)
        model.model.layers[0].mlp.up_proj.requires_grad_(True)
    policy = Policy(model, Precision(torch.float32, torch.float32, None), None, chunks=chunks)
    use_recompute(model, TrainConfig.model_validate({"model": "m", "optimizer": "adamw", "recompute": recompute}))
    policy.train(True)
    return policy


def batch(lengths: tuple[int, ...] = (9, 40, 30)) -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    documents = []
    for length in lengths:
        ids = torch.randint(4, VOCAB_SIZE, (length,), generator=generator).numpy()
        documents.append(Document(ids, ids >= 0))
    return collate(documents)


def gradients(policy: Policy, total: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = policy.trainable()
    return dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_the_supervised_loss_and_its_gradient_are_those_of_float64(bias: bool) -> None:
    torch.manual_seed(0)
    hidden, targets = torch.randn(M, E, requires_grad=True), torch.randint(0, V, (M,))
    head = torch.nn.Linear(E, V, bias=bias)
    total = summed_logprob(hidden, head, targets, vocab_size=V, chunks=7)
    found = torch.autograd.grad(-total / M, [hidden, head.weight])

    wide, weight = hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(wide, weight, head.bias.detach().double() if bias else None)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(-total.double() / M, expected, rtol=1e-6, atol=0)
    for ours, exact in zip(found, torch.autograd.grad(expected, [wide, weight]), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-8)


def test_gradients_of_single_logprobs_are_those_of_float64() -> None:
    torch.manual_seed(0)
    hidden, targets = torch.randn(M, E, requires_grad=True), torch.randint(0, V, (M,))
    head, temperature, weights = torch.nn.Linear(E, V, bias=False), torch.rand(M) + 0.5, torch.randn(M)
    logprobs, _ = token_logprobs(hidden, head, targets, temperature, vocab_size=V, chunks=7)
    found = torch.autograd.grad((logprobs * weights).sum(), [hidden, head.weight])

    wide, weight = hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    exact = (wide @ weight.T / temperature.double()[:, None]).log_softmax(-1)[torch.arange(M), targets]
    for ours, expected in zip(
        found, torch.autograd.grad((exact * weights.double()).sum(), [wide, weight]), strict=True
    ):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-7)


STEP = """
import sys
from tests.helpers.models.engine import open_engine, sample
from tests.helpers.peak import rise

engine, _ = open_engine("grpo", sys.argv[2], {"model": sys.argv[1], "sequence_len": 2048, "lora": False})
engine.train_step(1, [sample("short", range(4, 24), 1)])  # libraries are loaded, threads are there
with rise() as risen:
    engine.train_step(2, [sample("long", [n % 250 + 4 for n in range(2048)], 1)])
print(risen.size)
"""


def test_a_step_takes_a_small_part_of_the_memory_of_all_logits(tmp_path: Path) -> None:
    length, vocabulary = 2048, 40_000
    make_tiny_model(tmp_path / "model", hidden=32, vocab_size=vocabulary, max_position_embeddings=length)
    ran = subprocess.run(
        [sys.executable, "-c", STEP, tmp_path / "model", tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout.split()[-1]) < 4 * length * vocabulary / 4


@pytest.mark.parametrize("summed", [True, False])
def test_logits_of_all_tokens_are_never_made(monkeypatch: pytest.MonkeyPatch, summed: bool) -> None:
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", 10 * VOCAB_SIZE)
    policy, packed = tiny_policy(), batch()
    with Sizes() as sizes:
        total = policy.summed_logprob(packed) if summed else policy.logprobs(packed, with_entropy=True)[0].sum()
        total.backward()
    assert 0 < sizes.most_logits(HIDDEN) <= 10 < len(packed.targets)


def test_frozen_heads_get_no_gradient_and_make_logits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", 10 * VOCAB_SIZE)
    policy, packed = tiny_policy(lora=True), batch()
    with Sizes() as sizes:
        policy.summed_logprob(packed).backward()
    assert policy.model.get_output_embeddings().weight.grad is None
    made = [shape[1] for shape in sizes.products if shape[0] == VOCAB_SIZE]
    assert sum(made) == len(packed.targets)


def test_capped_logits_are_made_in_chunks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0, initializer_range=0.5,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    use_packed_attention(model)
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", 5 * VOCAB_SIZE)
    policy, packed = Policy(model, Precision(torch.float32, torch.float32, None), None), batch((20,))
    with Sizes() as sizes:
        total = policy.summed_logprob(packed)
        total.backward()
    assert 0 < sizes.most_logits(hidden=32) <= 5
    expected = plain(packed.input_ids).logits[0].log_softmax(-1)[torch.arange(len(packed.targets)), packed.targets]
    torch.testing.assert_close(total, expected.sum(), rtol=1e-5, atol=1e-5)


def test_recomputation_keeps_less_and_changes_nothing() -> None:
    found = {}
    for mode in (False, "selective", True):
        policy = tiny_policy(mode)
        with saved_bytes() as kept:
            total = policy.summed_logprob(batch())
        found[mode] = (sum(kept), gradients(policy, total))
    assert found[True][0] < found["selective"][0] or found[True][0] < found[False][0] / 2
    for mode in (True, "selective"):
        for name, gradient in found[mode][1].items():
            assert torch.equal(gradient, found[False][1][name]), name


def test_selective_recomputation_repeats_no_product() -> None:
    products = {}
    for mode in (False, "selective", True):
        policy = tiny_policy(mode)
        total = policy.summed_logprob(batch())
        with Sizes() as sizes:
            total.backward()
        products[mode] = len(sizes.products)
    assert products[False] == products["selective"] < products[True]


@pytest.mark.parametrize("mode", [True, "selective", False])
def test_the_configuration_takes_all_three(mode: Any) -> None:
    assert TrainConfig.model_validate({"model": "m", "optimizer": "adamw", "recompute": mode}).recompute == mode
