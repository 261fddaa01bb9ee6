"""How much of its device a step used: MFU, memory, and now and then what the driver says."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from surogate.config.train import TrainConfig
from surogate.telemetry import metrics as names
from trainer_svc.worker.device.flops import StepFlops, device_peak


class DeviceUse:
    """Measures of steps that `world_size` devices make together; nothing of it on a CPU."""

    def __init__(self, model: PreTrainedModel, train: TrainConfig, world_size: int) -> None:
        self._device = torch.device(model.device)
        self._flops = StepFlops(model)
        peak = device_peak(self._device) if train.peak_tflops is None else train.peak_tflops * 1e12
        self._peak = None if peak is None else peak * world_size
        asked = self._device.type == "cuda" and importlib.util.find_spec("pynvml") is not None
        self._interval = train.log_gpu_util if asked else 0

    def of_step(self, step: int, lengths: Iterable[int], predicted: int, seconds: float) -> dict[str, float]:
        """Metrics of step `step`, counted from 1, of documents of these lengths with `predicted` learned tokens."""
        found = {}
        if self._peak is not None:
            found[names.MFU] = self._flops.of(lengths, predicted) / seconds / self._peak
        if self._device.type == "cuda":
            found[names.GPU_BYTES] = float(torch.cuda.max_memory_reserved(self._device))
        if self._interval and step % self._interval == 0:
            found[names.GPU_UTILIZATION] = torch.cuda.utilization(self._device) / 100
            found[names.GPU_WATTS] = torch.cuda.power_draw(self._device) / 1000
            found[names.GPU_CELSIUS] = float(torch.cuda.temperature(self._device))
        return found
