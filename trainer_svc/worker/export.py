"""The weights as inference takes them: an image in memory, and its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from surogate.internal.v1 import worker_pb2 as worker
from surogate.v1 import common_pb2, weights_pb2
from surogate.weights.manifest import write_image
from trainer_svc.worker.adapters import lora
from trainer_svc.worker.model.noise import deviation, with_noise
from trainer_svc.worker.session import TrainingSession
from trainer_svc.worker.shares import whole_state

_DTYPES = {
    torch.float32: common_pb2.DTYPE_F32,
    torch.float16: common_pb2.DTYPE_F16,
    torch.bfloat16: common_pb2.DTYPE_BF16,
    torch.int64: common_pb2.DTYPE_I64,
    torch.int32: common_pb2.DTYPE_I32,
    torch.uint8: common_pb2.DTYPE_U8,
    torch.bool: common_pb2.DTYPE_BOOL,
}


def export_weights(session: TrainingSession, version: int, directory: Path) -> worker.ExportWeightsReply:
    """Writes what `session.pushes` says, in the model's stored format, into `directory`.

    Version 0 is the base under the adapter.
    All ranks take part; rank 0 writes, and the others' reply is empty.
    """
    policy, train, stored = session.policy, session.train, session.policy.precision.stored
    kind, config = session.pushes.kind, ""
    if version == 0:
        kind, state = weights_pb2.WEIGHT_KIND_BASE, lora.base_state(policy.model, stored)
    elif kind == weights_pb2.WEIGHT_KIND_DELTA:
        state = lora.changed_state(policy.model, stored)
    elif policy.adapter is not None:
        state, config = lora.tensors(policy.adapter, stored), lora.config_json(policy.adapter)
    else:
        state = whole_state(policy.model, stored)
    if not session.ranks.first:
        return worker.ExportWeightsReply()
    if kind != weights_pb2.WEIGHT_KIND_LORA:
        state = stored_state(policy.model, state, stored)
    if kind == weights_pb2.WEIGHT_KIND_FULL and train.noise_scheduler.enabled:
        sigma = deviation(session.step, train.max_steps, train.noise_scheduler)
        state = with_noise(policy.model, state, sigma, seed=train.train_seed, version=version)
    path = directory / f"weights-{version}.safetensors"
    tensors = [(name, _DTYPES[value.dtype], tuple(value.shape), _bytes(value)) for name, value in state.items()]
    manifest = write_image(path, tensors, version=version, kind=kind, adapter_config_json=config)
    return worker.ExportWeightsReply(path=str(path), manifest=manifest)


def stored_state(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Weights by the names of the model's checkpoint, floats in `dtype`; tied ones once, under their first name."""
    seen: set[tuple[int, torch.Size]] = set()
    stored = {}
    for name, value in state.items():
        place = (value.data_ptr(), value.shape)
        if place not in seen:
            seen.add(place)
            stored[name] = value.to(dtype) if value.is_floating_point() else value
    return dict(revert_weight_conversion(model, stored))


def _bytes(value: torch.Tensor) -> memoryview:
    """The tensor's bytes; no copy if it is on the CPU and contiguous."""
    flat: Any = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
