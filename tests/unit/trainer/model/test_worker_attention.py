"""Attention stays inside each document of a packed row, and gives what each document gives alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, PreTrainedModel

from tests.helpers.models.tiny import make_tiny_model
from trainer_svc.worker.model.attention import Documents, packed_attention, use_packed_attention

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 97, "head_dim": 16, "max_position_embeddings": 128}

MODELS = {
    "llama": LlamaConfig(**SIZES),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=4),
    "gemma2 with soft caps and a window": Gemma2Config(
        **SIZES, sliding_window=4, attn_logit_softcapping=5.0, query_pre_attn_scalar=16
    ),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


LENGTHS = [5, 30, 17, 31, 32, 3, 1, 100, 20]
LONG = [100, 1, 110, 110, 90, 3]


def hidden_states(model: PreTrainedModel, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    output = model.base_model(input_ids=ids, position_ids=positions, use_cache=False, documents=Documents.of(lengths))
    return output.last_hidden_state[0]


def packed_and_reference(model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    use_packed_attention(model)
    return model, reference


@pytest.mark.parametrize("lengths", [LENGTHS, LONG, [7, 7, 7], [13], [1, 1], [40, 2, 39]], ids=str)
def test_every_document_gives_what_it_gives_alone(lengths: list[int]) -> None:
    packed, reference = packed_and_reference(make_tiny_model(hidden=128, layers=2, std=0.1))
    ids = torch.randint(4, 260, (1, sum(lengths)))
    together = hidden_states(packed, ids, lengths)
    alone = [reference.base_model(input_ids=part).last_hidden_state[0] for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [LENGTHS, LONG], ids=str)
def test_gradients_are_those_of_the_documents_alone(lengths: list[int]) -> None:
    packed, reference = packed_and_reference(make_tiny_model(hidden=128, layers=2, std=0.1))
    ids, weights = torch.randint(4, 260, (1, sum(lengths))), torch.randn(sum(lengths), 128)
    (hidden_states(packed, ids, lengths) * weights).sum().backward()
    for part, weight in zip(ids.split(lengths, dim=1), weights.split(lengths), strict=True):
        (reference.base_model(input_ids=part).last_hidden_state[0] * weight).sum().backward()
    for (name, ours), theirs in zip(packed.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-3, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("lengths", [[9, 3, 20], LONG], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_other_architectures(name: str, lengths: list[int]) -> None:
    packed, reference = packed_and_reference(AutoModelForCausalLM.from_config(MODELS[name]).eval())
    ids = torch.randint(4, 97, (1, sum(lengths)))
    alone = [reference.base_model(input_ids=part).last_hidden_state[0] for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(hidden_states(packed, ids, lengths), torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_short_documents_are_gathered_with_little_padding() -> None:
    documents = Documents.of([32, 30, 29, 5, 4, 100])
    assert [(bucket.count, bucket.length) for bucket in documents.buckets] == [(1, 100), (3, 32), (2, 5)]


def test_long_documents_stay_where_they_are() -> None:
    documents = Documents.of(LONG)
    assert documents.slots is None and not documents.even
    assert [(b.count, b.length) for b in documents.buckets] == [(1, 100), (1, 1), (2, 110), (1, 90), (1, 3)]


def test_documents_of_one_length_are_not_moved_at_all() -> None:
    documents = Documents.of([16] * 8)
    assert documents.slots is None and documents.even
    assert [(bucket.count, bucket.length) for bucket in documents.buckets] == [(8, 16)]


def test_without_documents_the_row_is_one_document() -> None:
    q, k = torch.randn(1, 4, 11, 8), torch.randn(1, 2, 11, 8)
    output, _ = packed_attention(nn.Identity(), q, k, k, None)
    expected = nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(output, expected.transpose(1, 2))
