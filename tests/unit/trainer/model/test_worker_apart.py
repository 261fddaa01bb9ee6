"""Architectures that would mix the documents of a packed row, or cannot take one, are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from surogate.errors import ConfigError
from tests.helpers.models.architectures import SIZES
from tests.helpers.models.engine import open_engine
from tests.helpers.models.tiny import make_tiny_tokenizer

SMALL = {name: value for name, value in SIZES.items() if name not in ("head_dim", "bos_token_id")}
RECURRENT = {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 64}
LIGHTNING = {"head_dim": 8, "num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("RecurrentGemma", RECURRENT, "RecurrentGemmaForCausalLM mixes the documents of a packed row"),
        ("MiniMax", LIGHTNING, "MiniMaxForCausalLM mixes the documents of a packed row"),
        ("Roberta", {"is_decoder": True}, "counts their positions otherwise than alone"),
        ("Xmod", {"is_decoder": True}, r"fails on a packed row \(ValueError: Input language unknown"),
    ],
)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_what_cannot_be_packed_is_refused(
    tmp_path: Path, kind: str, more: dict[str, Any], said: str, lora: bool
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**{**SMALL, **more})
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    make_tiny_tokenizer(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "a lamb and a wolf"}))
    data = [{"path": str(tmp_path / "data.jsonl"), "type": "text"}]
    train = {"model": str(tmp_path / "model"), "datasets": data, "sequence_len": 64, "lora": lora}
    with pytest.raises(ConfigError, match=f"train.model: the architecture .*{said}"):
        open_engine("pt", tmp_path / "out", train)


def test_a_head_behind_another_layer_is_the_models_own_business(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.ElectraConfig(**{**SMALL, "is_decoder": True, "embedding_size": 16})
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    make_tiny_tokenizer(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "a lamb and a wolf"}))
    data = [{"path": str(tmp_path / "data.jsonl"), "type": "text"}]
    train = {"model": str(tmp_path / "model"), "datasets": data, "sequence_len": 64, "lora": False, "max_steps": 1}
    engine, reporter = open_engine("pt", tmp_path / "out", {**train, "validation_split_ratio": 0})
    document = engine._run._read(0)[0][0]  # type: ignore[union-attr]
    ids = torch.from_numpy(document.token_ids)[None]
    with torch.no_grad():
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        expected = float(torch.nn.functional.cross_entropy(plain(ids).logits[0, :-1], ids[0, 1:]))
    for module in engine.session.policy.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    engine.run()
    assert reporter.losses == pytest.approx([expected], rel=1e-5)
