"""Steps of the trainer's own worker on a model of random weights, without services around it: for a CUDA card.

`python -m tests.bench.trainer_case --shape 0.6B --sequence 2048 …` prints what it measured as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
"""What Qwen3's sizes differ in, and one to try the benchmark with."""

COMMON: dict[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
OTHERS: dict[str, dict[str, Any]] = {"tiny": {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 512}}


@dataclass(frozen=True)
class Case:
    """A session of the trainer: `rows` sequences of `sequence` tokens a micro-batch, `micro_batches` a step."""

    shape: str
    kind: Literal["sft", "grpo"] = "sft"
    lora: bool = True
    sequence: int = 2048
    rows: int = 2
    micro_batches: int = 4
    documents: int = 1
    """Documents of equal length that fill a sequence."""
    dtype: str = "bfloat16"
    recipe: str = "bf16"
    recompute: str = "false"
    steps: int = 12
    warm: int = 3
    """Steps before those that count: they compile."""

    def train(self, folder: Path) -> dict[str, Any]:
        """train.yaml."""
        return {
            "model": str(folder),
            "from_scratch": True,
            "torch_dtype": self.dtype,
            "recipe": self.recipe,
            "sequence_len": self.sequence,
            "per_device_train_batch_size": self.rows,
            "gradient_accumulation_steps": self.micro_batches,
            "max_steps": self.warm + self.steps,
            "recompute": {"true": True, "false": False}.get(self.recompute, self.recompute),
            "optimizer": "adamw",
            "lora": self.lora,
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "save_steps": 0,
            "resume_from_checkpoint": False,
        }


class Silent:
    """Hears what the run reports, and says warnings on."""

    stop_requested = False

    def step(self, *_: Any, **__: Any) -> None: ...

    def checkpoint(self, *_: Any, **__: Any) -> None: ...

    def evaluation(self, *_: Any, **__: Any) -> None: ...

    def warning(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def measure(case: Case, profile: Path | None = None) -> dict[str, Any]:
    """Trains and returns the medians of the steps that count."""
    started = time.perf_counter()
    import torch

    from surogate.config.train import TrainConfig
    from trainer_svc.worker import determinism
    from trainer_svc.worker.device.flops import StepFlops, device_peak
    from trainer_svc.worker.session import load_session

    determinism.set_up(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model_folder(folder / "model", case.shape)
        train = TrainConfig.model_validate(case.train(folder / "model"))
        session = load_session(case.kind, train, folder / "out", None)
        session.start_optimizer(train.max_steps)
        step = supervised_steps(case, session) if case.kind == "sft" else grpo_steps(case, session)
        device = session.policy.device
        on_card = device.type == "cuda"
        seconds, losses, first = [], [], 0.0
        for number in range(case.warm + case.steps):
            begin = time.perf_counter()
            losses.append(step()["loss"])
            if on_card:
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begin)
            first = first or time.perf_counter() - started
            print(f"step {number}: {seconds[-1]:.4f} s, loss {losses[-1]:.5f}", file=sys.stderr, flush=True)
        if profile is not None:
            write_profile(step, profile)
    counted = seconds[case.warm :]
    typical = statistics.median(counted)
    length, count = case.sequence // case.documents, case.rows * case.micro_batches * case.documents
    learned = length - (1 if case.kind == "sft" else length // 4)
    flops = StepFlops(session.policy.model).of([length] * count, count * learned)
    peak = device_peak(device)
    return {
        **asdict(case),
        "device": torch.cuda.get_device_name(device) if on_card else "cpu",
        "torch": torch.__version__,
        "first_step_seconds": first,
        "step_seconds": typical,
        "step_seconds_range": [min(counted), max(counted)],
        "tokens_per_second": count * length / typical,
        "tflops": flops / typical / 1e12,
        "mfu": None if peak is None else flops / typical / peak,
        "memory_gib": torch.cuda.max_memory_reserved(device) / 2**30 if on_card else None,
        "losses": [losses[0], losses[-1]],
    }


def make_model_folder(folder: Path, shape: str) -> None:
    """The configuration of a Qwen3 and a tokenizer; the weights are made where the model trains."""
    from transformers import Qwen3Config

    from tests.helpers.models.tiny import make_tiny_tokenizer

    make_tiny_tokenizer(folder)
    numbers = {**COMMON, **SHAPES[shape], **OTHERS.get(shape, {})}
    Qwen3Config(**numbers, tie_word_embeddings=shape != "8B").save_pretrained(folder)


def supervised_steps(case: Case, session: Any) -> Any:
    """One call, one optimiser step of SFT on random tokens that are all learned."""
    import numpy as np

    from trainer_svc.worker.data.prepare import SessionData
    from trainer_svc.worker.data.store import EncodedData
    from trainer_svc.worker.model.batch import Document
    from trainer_svc.worker.supervised import SupervisedRun

    random = np.random.default_rng(0)
    length = case.sequence // case.documents
    count = case.rows * case.micro_batches * case.documents * 4
    documents = [
        Document(random.integers(2, session.policy.vocab_size, length), np.ones(length, dtype=np.bool_))
        for _ in range(count)
    ]
    run = SupervisedRun(session, SessionData(EncodedData(documents), None, (), False, Path()), Silent())
    return run.train_step


def grpo_steps(case: Case, session: Any) -> Any:
    """One call, one step of GRPO on random rollouts of which three quarters are completion."""
    import numpy as np

    from surogate.v1 import trainer_pb2
    from trainer_svc.worker import grpo

    random = np.random.default_rng(0)
    length = case.sequence // case.documents
    prompt = length // 4
    samples = [
        trainer_pb2.TrainingSample(
            sample_id=f"{index:06d}",
            token_ids=random.integers(2, session.policy.vocab_size, length).tolist(),
            loss_mask=[place >= prompt for place in range(length)],
            sampler_logprobs=[-12.0 if place >= prompt else 0.0 for place in range(length)],
            advantage=1.0 if index % 2 else -1.0,
            temperature=1.0,
        )
        for index in range(case.rows * case.micro_batches * case.documents)
    ]
    return lambda: grpo.train_step(session, samples, Silent())


def write_profile(step: Any, folder: Path) -> None:
    """What a step spends its time on: kernels by their time, and the trace."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy: dict[str, list[float]] = {}
    for event in events:
        entry = busy.setdefault(event.name, [0.0, 0])
        entry[0] += event.device_time
        entry[1] += 1
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    total = sum(entry[0] for entry in busy.values())
    lines = [f"span {span / 1e3:.1f} ms, kernels {total / 1e3:.1f} ms"]
    for name, (time_us, number) in sorted(busy.items(), key=lambda item: -item[1][0])[:60]:
        lines.append(f"{time_us / 1e3:9.2f} ms {int(number):6d} x {time_us / number:8.1f} us  {name[:150]}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in asdict(Case("0.6B")).items():
        if isinstance(value, bool):
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--profile", type=Path)
    arguments = vars(parser.parse_args())
    profile = arguments.pop("profile")
    print(json.dumps(measure(Case(**arguments), profile)), flush=True)


if __name__ == "__main__":
    main()
