"""The model card of a final model or adapter: how it was made, in the form that the Hugging Face hub reads."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from trainer_svc.worker.session import TrainingSession

CARD = "README.md"

_MODES = {"pt": "pretraining", "sft": "supervised fine-tuning", "grpo": "GRPO"}
_SHOWN = (
    "learning_rate", "lr_scheduler_type", "optimizer", "weight_decay", "max_grad_norm", "sequence_len",
    "sample_packing", "per_device_train_batch_size", "gradient_accumulation_steps", "torch_dtype", "train_seed",
)  # fmt: skip
_SHOWN_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules")


def write_card(session: TrainingSession, folder: Path, *, merged: bool = False) -> None:
    """Writes the card into the folder. Raises OSError."""
    (folder / CARD).write_text(card(session, merged=merged), encoding="utf-8")


def card(session: TrainingSession, *, merged: bool = False) -> str:
    """The card's text."""
    train, adapter = session.train, session.policy.adapter is not None
    base = Path(train.model).name
    kind = "LoRA adapter" if adapter and not merged else "model with its LoRA adapter merged" if merged else "model"
    library = "peft" if adapter and not merged else "transformers"
    front = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags:", "- surogate", "---"]
    rows = [(key, getattr(train, key)) for key in (*_SHOWN, *(_SHOWN_LORA if adapter else ()))]
    data = [entry.path for entry in train.datasets or []]
    return "\n".join(
        [
            *front,
            "",
            f"# {base}, {_MODES[session.kind]}",
            "",
            f"A {kind}, made by Surogate: {_MODES[session.kind]} of `{base}`"
            f"{' from random weights' if train.from_scratch else ''}, {session.step} optimiser steps on "
            f"{session.ranks.world_size} process(es).",
            "",
            *([f"Data: {', '.join(f'`{Path(path).name}`' for path in data)}.", ""] if data else []),
            "| setting | value |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in rows),
            "",
            f"Made with torch {torch.__version__} and transformers {transformers.__version__}.",
            "",
        ]
    )
