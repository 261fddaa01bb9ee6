"""What a job is about to do, in a line for people: said before it does it."""

from __future__ import annotations

from typing import Any

from surogate.client.jobs import train_keys
from surogate.structs import from_struct
from surogate.v1 import job_pb2

_QUANTISED = {"qlora_bnb": "NF4", "qlora_fp8": "FP8", "qlora_fp4": "NVFP4"}
_TITLES = {job_pb2.Job.KIND_PT: "pretraining", job_pb2.Job.KIND_SFT: "fine-tuning", job_pb2.Job.KIND_GRPO: "GRPO of"}


def plan(job: job_pb2.Job) -> str:
    """`fine-tuning a LoRA adapter (rank 16) of /models/x: 200 steps of 8 sequences of up to 1,024 tokens`."""
    train = train_keys(job)
    config = from_struct(job.config)
    trained = f"{_trained(train)}{_pushed(train, config.get('infer'))}"
    what = f"{_TITLES.get(job.kind, 'training')} {trained} of {train.get('model', '?')}"
    if train.get("from_scratch"):
        what += ", from random ones"
    orch = config.get("orch")
    steps = _rollouts(orch) if isinstance(orch, dict) else _sequences(train)
    length = f"{job.max_steps:,} steps" if job.max_steps else f"{train.get('num_epochs', '?')} epochs"
    return f"{what}: {length}{' of ' if job.max_steps else ', in steps of '}{steps}"


def _trained(train: dict[str, Any]) -> str:
    if not train.get("lora"):
        return "all weights"
    quantised = next((name for key, name in _QUANTISED.items() if train.get(key)), None)
    return f"a LoRA adapter (rank {train.get('lora_rank')}{f', base in {quantised}' if quantised else ''})"


def _pushed(train: dict[str, Any], infer: Any) -> str:
    """How inference is given it where that is not as it is trained."""
    merged = train.get("lora") and isinstance(infer, dict) and infer.get("enable_lora") is False
    return ", pushed as merged weights," if merged else ""


def _sequences(train: dict[str, Any]) -> str:
    processes = max(1, train.get("gpus", 1))
    number = train.get("per_device_train_batch_size", 1) * train.get("gradient_accumulation_steps", 1) * processes
    return f"{number:,} sequences of up to {train.get('sequence_len', 0):,} tokens"


def _rollouts(orch: dict[str, Any]) -> str:
    size, each = orch.get("batch_size", 0), orch.get("rollouts_per_example", 1)
    names = ", ".join(str(env.get("name") or env.get("id")) for env in orch.get("env", []))
    return f"{size:,} rollouts, {each} for each prompt, rewarded by {names}"
