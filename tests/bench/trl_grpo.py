"""Steps of TRL's GRPOTrainer, generating with transformers as it does by itself; prints seconds per step as JSON.

`python -m tests.bench.trl_grpo MODEL --batch B --group G --tokens T --steps N`
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import pairwise
from typing import Any

from tests.bench.instant import NUM_PROMPTS, prompt_text

LORA_RANK, LORA_ALPHA, LEARNING_RATE = 16, 32, 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def seconds_per_step(model: str, *, batch: int, group: int, tokens: int, steps: int) -> list[float]:
    """Trains `steps` steps of `batch` rollouts, the whole batch in one pass, and returns what each took."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            if not ends:
                ends.append(time.perf_counter())

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            ends.append(time.perf_counter())

    def parity(completions: list[Any], **_kwargs: Any) -> list[float]:
        return [float(index % 2) for index in range(len(completions))]

    prompts = [{"prompt": [{"role": "user", "content": prompt_text(index)}]} for index in range(NUM_PROMPTS)]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            num_generations=group,
            max_completion_length=tokens,
            max_steps=steps,
            temperature=1.0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            logging_steps=1000,
            disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
        )
        adapter = LoraConfig(
            r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        GRPOTrainer(
            model=model,
            reward_funcs=parity,
            args=config,
            train_dataset=Dataset.from_list(prompts),
            peft_config=adapter,
            callbacks=[Clock()],
        ).train()
    return [end - begin for begin, end in pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    for name in ("batch", "group", "tokens", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    print(json.dumps(seconds_per_step(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
