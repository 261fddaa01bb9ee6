"""GRPO trains the policy that was sampled, also of models that drop values in training: GPT-2, OPT, some Llamas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from surogate.telemetry import metrics as names
from surogate.v1 import common_pb2, trainer_pb2
from tests.helpers.models.engine import open_engine, sample
from tests.helpers.models.tiny import make_tiny_tokenizer

RATE = 0.5
MODELS: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": RATE, "attn_pdrop": RATE, "embd_pdrop": RATE},
    "OPT": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
        "dropout": RATE,
        "attention_dropout": RATE,
        "layerdrop": RATE,
    },
    "Llama": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_dropout": RATE,
    },
}
TOKENS = (40, 41, 42, 43, 44, 45, 46, 47)


def make_model(folder: Path, kind: str) -> str:
    """A tiny random model of the kind, with its dropout."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=300, **MODELS[kind])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tiny_tokenizer(folder)
    return str(folder)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_computes_what_was_sampled(tmp_path: Path, kind: str, recompute: bool) -> None:
    train = {"model": make_model(tmp_path / "model", kind), "sequence_len": 64, "lora": False, "recompute": recompute}
    engine, _ = open_engine("grpo", tmp_path / "out", train)
    passes = []
    modules = engine.session.policy.model.named_modules()
    layer = next(module for name, module in modules if name.endswith(("mlp", "fc1")))
    layer.register_forward_pre_hook(lambda *_: passes.append(1))
    request = trainer_pb2.ComputeLogprobsRequest(sequences=[common_pb2.TokenSequence(ids=TOKENS)])
    sampled = engine.compute_logprobs(request).sequences[0].logprobs
    passes.clear()
    metrics = engine.train_step(1, [sample("a", TOKENS, 3, logprobs=sampled[2:])])
    assert len(passes) == (2 if recompute else 1)
    assert metrics[names.MISMATCH_KL] < 1e-12


def test_supervised_training_drops(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "some words that are learnt"}\n')
    train = {"model": make_model(tmp_path / "model", "GPT2"), "sequence_len": 64, "lora": False, "max_steps": 1}
    engine, _ = open_engine("sft", tmp_path / "out", {**train, "datasets": [{"path": str(data), "type": "text"}]})
    assert engine.session.policy.model.training
