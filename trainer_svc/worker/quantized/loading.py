"""Loads a model whose linear layers are quantised one after the other, so that never more than one is there in full.

It is transformers' own loading, with all that it knows of checkpoints, and a quantiser of ours registered with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from trainer_svc.worker.quantized.linear import QuantizedLinear
from trainer_svc.worker.quantized.record import Quantization

METHOD = "surogate"


def read_quantized(
    path: str, config: PretrainedConfig, quantization: Quantization, device: torch.device
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with its linear layers quantised, on `device`, and transformers' report of the loading.

    The output head and the layers that `quantization` skips stay as they are.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=quantization.dtype,
        output_loading_info=True,
        trust_remote_code=False,
        quantization_config=_Config(quantization, device),
    )
    model.hf_quantizer.remove_quantization_config(model)  # to everything else it is a model like any other
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False
    quantization.note(model)
    return model, report


def quantize_layers(model: PreTrainedModel, quantization: Quantization) -> None:
    """The same for a model that is there already."""
    for name, layer in _linear_layers(model, quantization.skip):
        model.set_submodule(name, QuantizedLinear.of(layer, quantization.storage))
    quantization.note(model)


def dequantize_layers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Makes plain layers again, with the weights that were computed with, in `dtype`."""
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, QuantizedLinear):
            with torch.device("meta"):
                plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight = torch.nn.Parameter(layer.full_weight(dtype), requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(name, plain)


@register_quantization_config(METHOD)
class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    """What transformers hands from `from_pretrained` to the quantiser."""

    def __init__(self, quantization: Quantization, device: torch.device) -> None:
        self.quant_method = METHOD
        self.quantization = quantization
        self.device = device


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces linear layers before the weights come, and gives each weight to its layer as it is read."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        del kwargs
        quantization: Quantization = self.quantization_config.quantization
        for name, layer in _linear_layers(model, quantization.skip):
            empty = QuantizedLinear(layer.in_features, layer.out_features, layer.bias is not None, quantization.storage)
            empty.to(layer.weight.dtype)
            model.set_submodule(name, empty)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        del kwargs
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, QuantizedLinear) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):  # type: ignore[misc]
    """Gives a weight to its layer. Nothing is left for transformers to set."""

    def __init__(self, quantizer: _Quantizer) -> None:
        self._quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, torch.Tensor]:
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            layer, _ = get_module_from_name(kwargs["model"], name)
            layer.store(weight.to(self._quantizer.quantization_config.device))
            layer.weight._is_hf_initialized = True
            layer._is_hf_initialized = True
            kwargs["missing_keys"].discard(name)
        return {}


def _linear_layers(model: PreTrainedModel, skip: Sequence[str]) -> list[tuple[str, torch.nn.Linear]]:
    """The layers to quantise, by name. `skip`: parts of names, as `layers.0`."""
    kept = [f".{name}." for name in (*get_keys_to_not_convert(model), *skip)]
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not isinstance(module, QuantizedLinear)
        and not any(other in f".{name}." for other in kept)
    ]
