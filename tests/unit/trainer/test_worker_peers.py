"""Loss curves against other trainers on the same model, data, order and hyper-parameters: TRL's and transformers'."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import datasets
import pytest
from peft import PeftModel, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from tests.helpers.models.engine import KeepingReporter, open_engine
from tests.helpers.models.tiny import make_tiny_model, make_tiny_tokenizer
from trainer_svc.worker.adapters import lora as adapters
from trainer_svc.worker.engine import Engine

STEPS, ROWS, MICRO_BATCHES = 20, 2, 2
DOCUMENTS = STEPS * ROWS * MICRO_BATCHES
"""One epoch: every document once."""

OURS: dict[str, Any] = {
    "sample_packing": False, "per_device_train_batch_size": ROWS, "gradient_accumulation_steps": MICRO_BATCHES,
    "learning_rate": 2e-3, "lr_scheduler_type": "linear", "warmup_steps": 4, "weight_decay": 0.1, "max_grad_norm": 0.5,
    "validation_split_ratio": 0, "sequence_len": 256, "num_epochs": 1, "lora_dropout": 0.0, "lora_rank": 4,
}  # fmt: skip
THEIRS: dict[str, Any] = {
    "per_device_train_batch_size": ROWS, "gradient_accumulation_steps": MICRO_BATCHES, "learning_rate": 2e-3,
    "lr_scheduler_type": "linear", "warmup_steps": 4, "weight_decay": 0.1, "max_grad_norm": 0.5, "num_train_epochs": 1,
    "optim": "adamw_torch", "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no",
    "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peers")
    make_tiny_model(path / "model", std=0.1)
    with (path / "chat.jsonl").open("w") as file:
        for number in range(DOCUMENTS):
            question = {"role": "user", "content": f"What is {number} times {number % 7}?"}
            answer = {"role": "assistant", "content": f"{number * (number % 7)}" + ", I think" * (number % 5)}
            more = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}] * (number % 3)
            file.write(json.dumps({"messages": [question, answer, *more]}) + "\n")
    # Python's own documentation of its keywords and topics, as `help()` shows it.
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    (path / "python.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[:30]))
    return path


def order(engine: Engine) -> list[int]:
    """Indices of the documents in the order in which they are trained on."""
    run = engine._run
    assert run is not None
    return [i for step in range(run.total_steps) for batch in run._plan.micro_batches(step) for i in batch]


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rates(reporter: KeepingReporter) -> list[float]:
    """The learning rate of each step."""
    return [reporter.steps[step]["lr"] for step in sorted(reporter.steps)]


def their_rates(trainer: Trainer) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]


def opened(kind: str, folder: Path, out: Path, data: dict[str, Any], **keys: Any) -> tuple[Engine, KeepingReporter]:
    return open_engine(kind, out, {**OURS, "model": str(folder / "model"), "datasets": [data], **keys})


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_fine_tuning_has_the_losses_of_trl(folder: Path, tmp_path: Path, lora: bool) -> None:
    trl = pytest.importorskip("trl")
    data = {"path": str(folder / "chat.jsonl"), "type": "conversation"}
    engine, reporter = opened("sft", folder, tmp_path, data, lora=lora)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model")
    if lora:
        ours = engine.session.policy.adapter
        assert ours is not None
        model = PeftModel(model, ours.peft_config["default"])
        set_peft_model_state_dict(model, {name: value.clone() for name, value in adapters.tensors(ours).items()})
    rows = datasets.Dataset.from_json(str(folder / "chat.jsonl"), cache_dir=str(tmp_path / "cache"))
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(tmp_path / "trl"), assistant_only_loss=True, max_length=None, **THEIRS),
        train_dataset=rows.select(order(engine)),
        processing_class=make_tiny_tokenizer(),
    )
    engine.run()
    assert len(reporter.losses) == STEPS
    assert reporter.losses == pytest.approx(losses(trainer), rel=1e-5)
    assert rates(reporter) == pytest.approx(their_rates(trainer), abs=1e-12)
    assert reporter.losses[-1] < reporter.losses[0]


def test_pretraining_on_a_real_text_comes_to_the_loss_of_transformers(folder: Path, tmp_path: Path) -> None:
    data = {"path": str(folder / "python.jsonl"), "type": "text"}
    keys = {"from_scratch": True, "lora": False, "max_steps": 60, "lr_scheduler_type": "cosine", "num_epochs": 9}
    engine, reporter = opened("pt", folder, tmp_path, data, **keys)
    engine.session.policy.model.save_pretrained(tmp_path / "start")
    run = engine._run
    assert run is not None and run.total_steps == 60
    documents = run._data.training
    rows = [{"input_ids": documents[i].token_ids, "labels": documents[i].token_ids} for i in order(engine)]
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "start"),
        TrainingArguments(str(tmp_path / "theirs"), **{**THEIRS, "lr_scheduler_type": "cosine", "max_steps": 60}),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(make_tiny_tokenizer()),
    )
    engine.run()
    expected = losses(trainer)
    assert rates(reporter) == pytest.approx(their_rates(trainer), abs=1e-12)
    assert reporter.losses[:20] == pytest.approx(expected[:20], rel=1e-5)
    assert reporter.losses == pytest.approx(expected, rel=1e-3)  # what rounding became of 60 steps
    assert sum(reporter.losses[-5:]) < 0.75 * sum(reporter.losses[:5])
