"""Steps of supervised training of one model on one file of text, by our worker or by TRL's SFTTrainer, in this process.

`python -m tests.bench.sft_steps ours|bfd|wrapped FOLDER --sequence N …`: what TRL packs by is its second name. Prints
JSON: seconds and tokens of each step, seconds from the start of the process to the end of the first, peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

LORA_RANK, LORA_ALPHA, LEARNING_RATE = 16, 32, 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock:
    """When steps end, and the tokens of each."""

    def __init__(self, started: float) -> None:
        self._started = started
        self._ends: list[float] = []
        self.tokens: list[float] = []

    def tick(self) -> None:
        """A step has ended."""
        self._ends.append(time.time())

    def found(self) -> dict[str, Any]:
        """All of it; the first step's seconds are those since the process began."""
        return {
            "first": self._ends[0] - self._started,
            "seconds": [end - begin for begin, end in pairwise(self._ends)],
            "tokens": self.tokens[1 : len(self._ends)],  # a batch of TRL's is read ahead
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


class Reporter:
    """Hears of steps, and asks the run to stop after so many: nothing is saved then."""

    def __init__(self, clock: Clock, steps: int) -> None:
        self._clock = clock
        self._steps = steps
        self.stop_requested = False

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._clock.tick()
        self._clock.tokens.append(metrics["tokens_per_second"] * metrics["time/train"])
        self.stop_requested = step == self._steps

    def checkpoint(self, *_: Any, **__: Any) -> None: ...

    def evaluation(self, *_: Any, **__: Any) -> None: ...

    def warning(self, text: str) -> None:
        print(text)


def ours(folder: Path, clock: Clock, *, sequence: int, rows: int, steps: int, lora: bool, dtype: str) -> None:
    """The worker's engine, as the trainer's front drives it."""
    from surogate.v1 import trainer_pb2
    from trainer_svc.worker.engine import Engine

    train = {
        "model": str(folder / "model"),
        "datasets": [{"path": str(folder / f"text-{sequence}.jsonl"), "type": "text"}],
        "validation_split_ratio": 0,
        "sequence_len": sequence,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "max_steps": steps + 2,
        "torch_dtype": dtype,
        "optimizer": "adamw",
        "learning_rate": LEARNING_RATE,
        "recompute": False,
        "save_steps": 0,
        "lora": lora,
        "lora_rank": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "lora_target_modules": TARGETS,
    }
    request = trainer_pb2.CreateSessionRequest(session_id="bench", output_dir=str(folder / "ours"), fresh=True)
    request.config.update({"kind": "sft", "train": train})
    engine = Engine(Reporter(clock, steps))
    engine.open(request)
    assert engine.run().stopped


def trl(
    folder: Path, clock: Clock, *, packing: str, sequence: int, rows: int, steps: int, lora: bool, dtype: str
) -> None:
    """TRL's trainer without checkpointing. `packing`: bfd keeps documents apart, wrapped does not."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            clock.tick()

    half = dtype == "bfloat16"
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=sequence,
        packing=True,
        packing_strategy=packing,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        weight_decay=0.1,
        gradient_checkpointing=False,
        bf16=half,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        logging_steps=1000,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "bfloat16" if half and lora else "float32"},
    )
    adapter = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        model=str(folder / "model"),
        args=config,
        train_dataset=load_dataset(
            "json", data_files=str(folder / f"text-{sequence}.jsonl"), split="train", cache_dir=str(folder / "cache")
        ),
        peft_config=adapter if lora else None,
        callbacks=[Steps()],
    )
    collate = trainer.data_collator

    def counted(features: Any) -> Any:
        batch = collate(features)
        mask = batch.get("attention_mask")
        clock.tokens.append(float(batch["input_ids"].numel() if mask is None else mask.sum()))
        return batch

    trainer.data_collator = counted
    trainer.train()


def main() -> None:
    started = time.time()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system", choices=("ours", "bfd", "wrapped"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--dtype", default="float32")
    for name in ("sequence", "rows", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = vars(parser.parse_args())
    system, clock = arguments.pop("system"), Clock(started)
    if system == "ours":
        ours(clock=clock, **arguments)
    else:
        trl(clock=clock, packing=system, **arguments)
    print(json.dumps(clock.found()))


if __name__ == "__main__":
    main()
