"""QLoRA: layers, gradients, loading, training, checkpoints, merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from surogate.errors import ConfigError
from surogate.v1 import trainer_pb2 as trainer
from surogate.v1 import weights_pb2
from tests.helpers.models.engine import open_engine, sample
from tests.helpers.models.tiny import VOCAB_SIZE, make_tiny_model, make_tiny_tokenizer
from trainer_svc.worker.commands import merge
from trainer_svc.worker.quantized.linear import QuantizedLinear
from trainer_svc.worker.quantized.loading import dequantize_layers, read_quantized
from trainer_svc.worker.quantized.record import Quantization
from trainer_svc.worker.quantized.storage import Fp8, Nf4, Nvfp4, Storage

STORAGES = [Nf4(), Fp8(16), Nvfp4()]
KEYS: dict[str, dict[str, Any]] = {
    "nf4": {"qlora_bnb": True},
    "fp8": {"qlora_fp8": True, "qlora_block_size": 16},
    "nvfp4": {"qlora_fp4": True},
}
IDS = torch.arange(40).reshape(2, 20) % VOCAB_SIZE


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder, std=0.1)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    lines = [json.dumps({"text": f"{word} and {word} again"}) for word in ("one", "two", "three", "four", "five")]
    path.write_text("\n".join(lines * 4))
    return path


def run_engine(kind: str, output: Path, model: Path, texts: Path, **train: Any) -> list[float]:
    keys = {
        "model": str(model),
        "datasets": [{"path": str(texts), "type": "text"}],
        "validation_split_ratio": 0,
        "sequence_len": 64,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "lora": True,
        "lora_rank": 4,
        "lora_dropout": 0.0,
    }
    engine, reporter = open_engine(kind, output, {**keys, **train})
    engine.run()
    return reporter.losses


@pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: storage.name)
def test_gradients_are_those_of_the_decoded_weight_in_float64(storage: Storage) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 32)
    quantized = QuantizedLinear.of(layer, storage)
    first, second = torch.nn.Linear(48, 4, bias=False), torch.nn.Linear(4, 32, bias=False)
    x = torch.randn(7, 48, requires_grad=True)
    (quantized(x) + second(first(x))).square().sum().backward()

    weight, bias = quantized.full_weight().double(), layer.bias.detach().double()
    x64, a, b = (value.detach().double().requires_grad_() for value in (x, first.weight, second.weight))
    (x64 @ weight.T + bias + x64 @ a.T @ b.T).square().sum().backward()
    for ours, theirs in ((x, x64), (first.weight, a), (second.weight, b)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-4)
    assert quantized.weight.grad is None and quantized.weight.dtype == torch.uint8


def test_under_autocast_products_are_bfloat16() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32, bias=False)
    quantized = QuantizedLinear.of(layer, Nf4())
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantized(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, x.bfloat16() @ quantized.full_weight(torch.bfloat16).T)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: storage.name)
def test_loading_quantises_what_the_files_hold(model_folder: Path, storage: Storage) -> None:
    quantization = Quantization(storage, torch.float32, skip=("layers.1",))
    config = AutoConfig.from_pretrained(model_folder)
    model, report = read_quantized(str(model_folder), config, quantization, torch.device("cpu"))
    assert not report["missing_keys"] and not report["unexpected_keys"]
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    for name, layer in plain.named_modules():
        mine = model.get_submodule(name)
        if isinstance(layer, torch.nn.Linear) and "layers.0" in name:
            expected = storage.decode(storage.encode(layer.weight.detach()), layer.weight.shape, torch.float32)
            assert isinstance(mine, QuantizedLinear) and torch.equal(mine.full_weight(), expected)
        else:
            assert not isinstance(mine, QuantizedLinear)
    with torch.no_grad():
        before = model(IDS).logits
        dequantize_layers(model, torch.float32)
        torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-6)
        assert (before - plain(IDS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", KEYS)
def test_a_job_trains_resumes_and_merges(name: str, model_folder: Path, texts: Path, tmp_path: Path) -> None:
    losses = run_engine("sft", tmp_path / "whole", model_folder, texts, merge_adapter=True, **KEYS[name])
    assert losses[-1] < losses[0] - 0.5

    resumed = tmp_path / "resumed"
    first = run_engine("sft", resumed, model_folder, texts, max_steps=6, save_steps=3, **KEYS[name])
    (resumed / "checkpoint-6" / "trainer_state" / "state.json").unlink()  # as if it had stopped in the last save
    second = run_engine("sft", resumed, model_folder, texts, max_steps=6, save_steps=3, **KEYS[name])
    assert first == losses and second == losses[3:]

    record = Quantization.read(tmp_path / "whole")
    assert record is not None and record.storage.name == name
    assert merge.main(["--adapter", str(tmp_path / "whole"), "--output", str(tmp_path / "merged")]) == 0
    model, _ = read_quantized(str(model_folder), AutoConfig.from_pretrained(model_folder), record, torch.device("cpu"))
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "whole")).eval()
    with torch.no_grad():
        expected = adapted(IDS).logits
        for folder in (tmp_path / "merged", tmp_path / "whole" / "merged"):
            merged = AutoModelForCausalLM.from_pretrained(folder).eval()
            torch.testing.assert_close(merged(IDS).logits, expected, rtol=0, atol=2e-5)


def test_the_run_is_that_of_lora_on_the_decoded_base(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    quantization = Quantization(Nf4(), torch.float32)
    config = AutoConfig.from_pretrained(model_folder)
    model, _ = read_quantized(str(model_folder), config, quantization, torch.device("cpu"))
    dequantize_layers(model, torch.float32)
    decoded = tmp_path / "decoded"
    make_tiny_model(decoded)  # the tokenizer
    model.save_pretrained(decoded)
    expected = run_engine("sft", tmp_path / "lora", decoded, texts)
    assert run_engine("sft", tmp_path / "qlora", model_folder, texts, qlora_bnb=True) == pytest.approx(
        expected, rel=1e-5
    )


def test_an_adapter_is_merged_before_the_base_is_quantised(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    run_engine("sft", tmp_path / "first", model_folder, texts)
    keys = {"adapter_path": str(tmp_path / "first"), "qlora_bnb": True}
    losses = run_engine("sft", tmp_path / "second", model_folder, texts, **keys)
    onto = run_engine("sft", tmp_path / "third", tmp_path / "second" / "base", texts, qlora_bnb=True)
    assert losses == onto  # the base that was written is the one that was trained on, before it was quantised
    named = json.loads((tmp_path / "second" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "second" / "base")


def test_only_adapters_are_in_the_output(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    run_engine("sft", tmp_path, model_folder, texts, max_steps=1, qlora_fp4=True)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_a_quantised_model_is_refused_by_name(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mx"
    make_tiny_model(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"train.model: .* quantised already \(fp8\)"):
        run_engine("sft", tmp_path / "out", folder, texts, qlora_bnb=True)


def test_in_grpo_the_base_is_exported_as_it_is_computed_with(model_folder: Path, tmp_path: Path) -> None:
    keys = {"model": str(model_folder), "sequence_len": 64, "max_steps": 3, "lora_rank": 4, **KEYS["nf4"]}
    engine, _ = open_engine("grpo", tmp_path, keys)
    exported = engine.export_weights(0, str(tmp_path))
    assert exported.manifest.kind == weights_pb2.WEIGHT_KIND_BASE and exported.manifest.version == 0
    served = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    original = {name: value.clone() for name, value in served.state_dict().items()}
    state = load_file(exported.path)
    left = served.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}  # tied to the embedding
    assert any(not torch.equal(value, original[name]) for name, value in state.items())
    tokens = IDS[0].tolist()
    with torch.no_grad():
        logprobs = served(IDS[:1]).logits[0, :-1].log_softmax(-1).gather(-1, IDS[0, 1:, None]).squeeze(-1)
    request = trainer.ComputeLogprobsRequest()
    request.sequences.add(ids=tokens)
    found = engine.compute_logprobs(request).sequences[0]
    torch.testing.assert_close(torch.tensor(found.logprobs), logprobs, rtol=0, atol=5e-6)

    engine.train_step(1, [sample("a", tokens, 10, advantage=1.0), sample("b", tokens[::-1], 10, advantage=-1.0)])
    later = engine.export_weights(0, str(tmp_path))
    assert later.manifest == exported.manifest  # whatever was trained since: a replica that comes late gets the same


@pytest.mark.parametrize(
    "keys", [{"skip_quant_first_layers": 1, "skip_quant_last_layers": 1}, {}], ids=["skipped", "gpt2"]
)
def test_a_job_that_would_quantise_nothing_is_refused(
    model_folder: Path, texts: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    if not keys:  # GPT-2 has layers of a kind of its own
        config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=1, n_head=2, n_positions=64)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
        make_tiny_tokenizer(tmp_path / "model")
    model = model_folder if keys else tmp_path / "model"
    with pytest.raises(ConfigError, match="qlora_fp8: is true, and nothing would be quantised: no layer of the"):
        run_engine("sft", tmp_path / "out", model, texts, qlora_fp8=True, **keys)
