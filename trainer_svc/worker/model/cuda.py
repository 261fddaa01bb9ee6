"""What is set up for speed where a model trains on a CUDA device. On a CPU nothing of it is used."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from transformers import PreTrainedModel

from surogate.config.train import TrainConfig
from trainer_svc.worker.adapters.lora_groups import AdapterGroups, group_adapters
from trainer_svc.worker.device.compiler import can_compile
from trainer_svc.worker.model.attention import LARGEST_HEAD
from trainer_svc.worker.model.precision import Precision
from trainer_svc.worker.model.spread import decoder_layers
from trainer_svc.worker.nvfp4.linear import Nvfp4Linear
from trainer_svc.worker.quantized.linear import QuantizedLinear

COMPILED_SHAPES = 64
"""So many times a layer may be compiled anew, for other shapes or for the adapter off, before it runs uncompiled."""

_log = logging.getLogger("trainer.worker")


@dataclass(frozen=True)
class Compiled:
    """That layers are compiled, and the adapters that are computed in groups."""

    adapters: AdapterGroups | None


def compile_layers(model: PreTrainedModel, train: TrainConfig, precision: Precision) -> Compiled | None:
    """Has the decoder layers compiled when they are first called; None where it is not done.

    It is for half precision, where attention goes through kernels that take documents of any length; weights that are
    decoded on the fly, products in NVFP4 and recomputation that picks operations are left to PyTorch as they are.
    """
    if model.device.type != "cuda" or precision.autocast is None or not _suits_kernels(model):
        return None
    left = (QuantizedLinear, Nvfp4Linear)
    if train.recompute == "selective" or any(isinstance(layer, left) for layer in model.modules()):
        return None
    if not can_compile():
        _log.warning("there is no C compiler (gcc, clang, or $CC), so that layers are not compiled; training is slower")
        return None
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    torch._dynamo.config.accumulated_recompile_limit = 4 * COMPILED_SHAPES
    adapters = group_adapters(model)
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = _OneAdapter
    for layer in decoder_layers(model):
        layer.compile()
    return Compiled(adapters)


class _OneAdapter(LoraLinear):  # type: ignore[misc]
    """peft's layer outside of groups (lora_groups.py), for other bases, without detours: its input is not widened to
    float32 first, and the small product is scaled instead of the large one.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        low = self.lora_A["default"](self.lora_dropout["default"](x)) * self.scaling["default"]
        added: torch.Tensor = self.lora_B["default"](low)
        return result + added.to(result.dtype)


def _suits_kernels(model: PreTrainedModel) -> bool:
    """Whether attention is plain enough for CUDA's kernels. Experts are left out: their work depends on the data."""
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    others = ("attn_logit_softcapping", "attention_dropout", "num_experts_per_tok")
    has_sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    return size <= LARGEST_HEAD and not has_sinks and not any(getattr(config, name, None) for name in others)
