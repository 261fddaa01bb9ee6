"""Every architecture: packed training is training on the same documents alone, through the model's own forward."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from surogate.errors import ConfigError
from surogate.v1 import trainer_pb2 as trainer
from tests.helpers.models.architectures import ARCHITECTURES, MIXTURES, make_model, make_mxfp4_model
from tests.helpers.models.engine import open_engine
from tests.helpers.models.tiny import VOCAB_SIZE
from trainer_svc.worker.adapters import lora as adapters
from trainer_svc.worker.commands import merge
from trainer_svc.worker.engine import Engine
from trainer_svc.worker.model.batch import Document
from trainer_svc.worker.supervised import SupervisedRun

STEPS = 3
TRAIN: dict[str, Any] = {
    "sequence_len": 256, "max_steps": STEPS, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "lora_rank": 4, "lora_alpha": 8,
    "lora_dropout": 0.0, "validation_split_ratio": 0,
}  # fmt: skip
IDS = torch.arange(4, 40)[None]
EXPERTS = {"lora_target_modules": ["all", "experts"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    words = ("lamb", "fence", "meadow full of flowers", "a", "wolf, who was hungry", "shepherd")
    rows = [
        {"messages": [{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": f"{b} and {a}"}]}
        for a in words
        for b in words
    ]
    (path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def model_of(name: str, folder: Path) -> Path:
    """The model's folder, made once."""
    if not (folder / name).exists():
        make_model(name, folder / name)
    return folder / name


def plain_model(folder: Path) -> Any:
    """As transformers loads it; its eager attention is the only one that knows soft caps and sinks on a CPU."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


class Plain:
    """transformers' model, PEFT's adapter if there is one, torch's AdamW; one document after the other."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        model = plain_model(folder)
        ours = engine.session.policy.adapter
        self.model = model if ours is None else PeftModel(model, ours.peft_config["default"])
        if ours is not None:
            set_peft_model_state_dict(self.model, {n: w.clone() for n, w in adapters.tensors(ours).items()})
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        groups = [
            {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": 0.1},
            {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=TRAIN["learning_rate"])

    def logprobs(self, ids: torch.Tensor) -> torch.Tensor:
        """Of every token but the first, [n - 1]."""
        logits = self.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]

    def step(self, documents: list[Document]) -> float:
        """The mean loss over the learned tokens of all documents, and one optimiser step."""
        learned = [self.logprobs(torch.from_numpy(d.token_ids))[torch.from_numpy(d.mask)[1:]] for d in documents]
        loss = -torch.cat(learned).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([w for w in self.model.parameters() if w.requires_grad], 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss)


def documents_of(engine: Engine) -> Iterator[list[Document]]:
    """Documents of each step of a run."""
    run: SupervisedRun | None = engine._run
    assert run is not None
    return ([document for batch in run._read(step) for document in batch] for step in range(STEPS))


def trained(folder: Path, out: Path, name: str, keys: dict[str, Any]) -> tuple[Engine, list[float], Plain, list[float]]:
    """Our losses and the plain ones, and what became of both models."""
    data = [{"path": str(folder / "chat.jsonl"), "type": "conversation"}]
    engine, reporter = open_engine(
        "sft", out, {**TRAIN, "model": str(model_of(name, folder)), "datasets": data, **keys}
    )
    plain = Plain(folder / name, engine)
    steps = [*documents_of(engine)]
    assert all(len(documents) >= 6 for documents in steps)  # in two rows
    engine.run()
    return engine, reporter.losses, [plain.step(documents) for documents in steps]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_are_those_of_the_documents_alone(folder: Path, tmp_path: Path, name: str, lora: bool) -> None:
    engine, losses, expected = trained(folder, tmp_path, name, {"lora": lora})
    assert losses == pytest.approx(expected, rel=1e-5)
    saved = plain_model(folder / name if lora else tmp_path)
    if lora:
        saved = PeftModel.from_pretrained(saved, tmp_path)
        merge.merge(tmp_path, str(folder / name), tmp_path / "merged")
        with torch.no_grad():
            merged = plain_model(tmp_path / "merged")(IDS).logits
            torch.testing.assert_close(merged, saved(IDS).logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(saved(IDS).logits, engine.session.policy.model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_of_grpo_are_those_of_transformers(folder: Path, tmp_path: Path, name: str) -> None:
    keys = {**TRAIN, "model": str(model_of(name, folder)), "sequence_len": 200}
    engine, _ = open_engine("grpo", tmp_path, keys)
    draw = random.Random(0)
    sequences = [[draw.randrange(4, VOCAB_SIZE) for _ in range(length)] for length in (40, 3, 25, 2, 60, 26)]
    request = trainer.ComputeLogprobsRequest(sequences=[{"ids": ids} for ids in sequences])
    found = engine.compute_logprobs(request)
    plain = Plain(folder / name, engine)
    for ids, ours in zip(sequences, found.sequences, strict=True):
        assert list(ours.logprobs) == pytest.approx(plain.logprobs(torch.tensor(ids)).tolist(), abs=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_adapters_on_experts(folder: Path, tmp_path: Path, name: str) -> None:
    _, losses, expected = trained(folder, tmp_path / "out", name, {**EXPERTS, "merge_adapter": True})
    assert losses == pytest.approx(expected, rel=1e-5)
    state = load_file(tmp_path / "out" / adapters.WEIGHTS_FILE)
    assert any("experts" in weight for weight in state)
    merge.merge(tmp_path / "out", str(folder / name), tmp_path / "merged")
    adapted = PeftModel.from_pretrained(plain_model(folder / name), tmp_path / "out")
    with torch.no_grad():
        for merged in (tmp_path / "out" / "merged", tmp_path / "merged"):
            torch.testing.assert_close(plain_model(merged)(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        (
            "qwen3-moe",
            "mlp.down_proj, mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.gate, mlp.gate_proj, mlp.up_",
        ),
        ("gpt-oss", "mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.router; add experts"),
    ],
)
def test_what_an_adapter_on_all_layers_does_not_reach_is_said(
    folder: Path, tmp_path: Path, name: str, left: str
) -> None:
    engine, reporter = open_engine("grpo", tmp_path, {**TRAIN, "model": str(model_of(name, folder))})
    assert any(f"no adapter is on {left}" in warning for warning in reporter.warnings)
    adapted = {weight.split(".lora_")[0].rpartition(".")[2] for weight in engine.session.policy.trainable()}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("modules", [["all"], ["q_proj", "down_proj"]])
def test_adapters_of_a_model_that_sees_are_on_its_language_model(
    folder: Path, tmp_path: Path, modules: list[str]
) -> None:
    keys = {"model": str(model_of("gemma3-vision", folder)), "lora_target_modules": modules}
    engine, _ = open_engine("grpo", tmp_path, {**TRAIN, **keys})
    adapted = {weight.split(".lora_")[0] for weight in engine.session.policy.trainable()}
    assert all(name.startswith("model.language_model.layers.") for name in adapted)
    assert len(adapted) == 2 * (7 if modules == ["all"] else 2)
    engine.checkpoint(final=True)
    saved = PeftModel.from_pretrained(plain_model(folder / "gemma3-vision"), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(saved(IDS).logits, engine.session.policy.model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "name", "keys", "said"),
    [
        ("sft", "qwen3-moe", {"lora_dropout": 0.1}, "train.lora_dropout: must be 0 with experts"),
        ("sft", "llama", {}, "train.lora_target_modules: names experts, and LlamaForCausalLM has no fused experts"),
        (
            "grpo",
            "qwen3",
            {"lora_target_modules": ["lm_head"]},
            "names lm_head: embedding and output head are one matrix",
        ),
        (
            "grpo",
            "qwen3",
            {"lora_target_modules": ["q_proj", "embed_tokens"]},
            "names embed_tokens: embedding and output head are one matrix",
        ),
    ],
)
def test_adapters_that_cannot_be_are_refused_by_name(
    folder: Path, tmp_path: Path, kind: str, name: str, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        open_engine(kind, tmp_path, {**TRAIN, **EXPERTS, "model": str(model_of(name, folder)), **keys})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pushed_weights_have_the_names_of_the_checkpoint(folder: Path, tmp_path: Path, name: str) -> None:
    engine, _ = open_engine("grpo", tmp_path, {**TRAIN, "model": str(model_of(name, folder)), "lora": False})
    pushed = load_file(engine.export_weights(1, str(tmp_path)).path)
    stored = load_file(folder / name / "model.safetensors")
    assert set(pushed) == set(stored)
    assert all(torch.equal(pushed[weight], value) for weight, value in stored.items())


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_checkpoint_in_mxfp4_is_trained_as_what_it_means(folder: Path, tmp_path: Path, lora: bool) -> None:
    meant = make_mxfp4_model(tmp_path / "model")
    data = [{"path": str(folder / "chat.jsonl"), "type": "conversation"}]
    train = {**TRAIN, "model": str(tmp_path / "model"), "datasets": data, "lora": lora, "save_steps": 1}
    engine, whole = open_engine("sft", tmp_path / "out", train)
    for name, value in meant.items():
        assert torch.equal(engine.session.policy.model.get_parameter(name), value)
    engine.run()
    saved = plain_model(tmp_path / "model").float() if lora else plain_model(tmp_path / "out")
    saved = PeftModel.from_pretrained(saved, tmp_path / "out") if lora else saved
    with torch.no_grad():
        torch.testing.assert_close(saved(IDS).logits, engine.session.policy.model(IDS).logits, rtol=1e-3, atol=1e-3)
    if lora:
        merge.merge(tmp_path / "out", str(tmp_path / "model"), tmp_path / "merged", dtype="float32")
        with torch.no_grad():
            found = plain_model(tmp_path / "merged")(IDS).logits
            torch.testing.assert_close(found, saved(IDS).logits, rtol=1e-3, atol=1e-3)
    (tmp_path / "again").mkdir()
    (tmp_path / "out" / "checkpoint-1").rename(tmp_path / "again" / "checkpoint-1")
    resumed, rest = open_engine("sft", tmp_path / "again", train)
    resumed.run()
    assert rest.losses == whole.losses[1:]
