"""Adapters that `adapter_path` names: what is damaged, or made for another model, is said, and none is half used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from surogate.config.train import TrainConfig
from surogate.errors import ConfigError
from tests.helpers.models.tiny import make_tiny_adapter, make_tiny_model
from trainer_svc.worker.adapters.given import CONFIG_FILE, WEIGHTS_FILE
from trainer_svc.worker.adapters.lora import adapter_folder, attach, load_weights, merge_adapter

MODELS: dict[str, dict[str, Any]] = {
    "own": {},
    "deeper": {"layers": 3},
    "wider": {"hidden": 96},
}
IDS = torch.arange(4, 60)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models by their names, and an adapter of each beside it."""
    path = tmp_path_factory.mktemp("given")
    for name, sizes in MODELS.items():
        make_tiny_model(path / name, std=0.1, **sizes)
        make_tiny_adapter(path / f"{name}-adapter", path / name, rank=8, alpha=16)
    return path


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def use(folder: Path, adapter: Path, mode: str) -> Any:
    """The model with the adapter merged, or with its weights in an adapter that is trained further."""
    model = base(folder / "own")
    if mode == "merge":
        return merge_adapter(model, str(adapter))
    keys = {"model": str(folder / "own"), "lora_rank": 8, "lora_alpha": 16, "torch_dtype": "float32"}
    attached = attach(model, TrainConfig.model_validate(keys), dropout=0.0)
    load_weights(attached, adapter_folder(str(adapter), "adapter_path"))
    return attached


@pytest.mark.parametrize("mode", ["merge", "trainable"])
@pytest.mark.parametrize("other", ["deeper", "wider"])
def test_one_of_another_base_is_refused(folder: Path, mode: str, other: str) -> None:
    said = {"deeper": r"differ in .*layers\.2\.", "wider": r"size mismatch for .*q_proj"}[other]
    with pytest.raises(ConfigError, match=rf"train\.adapter_path: .*{said}"):
        use(folder, folder / f"{other}-adapter", mode)


def cut(adapter: Path) -> None:
    path = adapter / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:1000])


def no_json(adapter: Path) -> None:
    (adapter / CONFIG_FILE).write_text("{ not json")


def no_type(adapter: Path) -> None:
    (adapter / CONFIG_FILE).write_text("{}")


def other_type(adapter: Path) -> None:
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps({**config, "peft_type": "IA3"}))


def as_bin(adapter: Path) -> None:
    (adapter / WEIGHTS_FILE).rename((adapter / WEIGHTS_FILE).with_suffix(".bin"))


def not_finite(adapter: Path) -> None:
    weights = load_file(adapter / WEIGHTS_FILE)
    next(iter(weights.values()))[:] = torch.nan
    save_file(weights, adapter / WEIGHTS_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("mode", ["merge", "trainable"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut, r"adapter_model\.safetensors is damaged: .*; get the file again"),
        (no_json, r"adapter_config\.json is not a JSON object"),
        (no_type, r"is a None adapter; only LORA can be used"),
        (other_type, r"is a IA3 adapter; only LORA can be used"),
        (as_bin, r"has no adapter_model\.safetensors; it has a \.bin: load it with peft's PeftModel and save it again"),
        (not_finite, r"NaNs|not finite"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_one_is_refused_by_name(
    folder: Path, tmp_path: Path, mode: str, spoil: Callable[[Path], None], said: str
) -> None:
    adapter = Path(shutil.copytree(folder / "own-adapter", tmp_path / "adapter"))
    spoil(adapter)
    with pytest.raises(ConfigError, match=rf"train\.adapter_path: .*{said}"):
        use(folder, adapter, mode)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_one_that_replaces_shared_weights_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], modules_to_save=[name], task_type="CAUSAL_LM")
    get_peft_model(base(folder / "own"), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"train\.adapter_path: .* adapts .*{name}, whose weights another layer"):
        use(folder, tmp_path, "merge")


@pytest.mark.parametrize(
    "more",
    [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 64}}],
    ids=["dora", "rslora", "patterns"],
)
def test_kinds_that_peft_knows_are_merged_as_it_computes_them(
    folder: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **more)
    made = get_peft_model(base(folder / "own"), config)
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    made.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base(folder / "own"), tmp_path).eval()(IDS).logits
        found = use(folder, tmp_path, "merge").eval()(IDS).logits
        plain = base(folder / "own").eval()(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)
