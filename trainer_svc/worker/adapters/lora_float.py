"""PEFT's LoRA layer where everything is float32: the adapter is added by the product that computes it."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from transformers import PreTrainedModel


class FloatLoraLinear(LoraLinear):  # type: ignore[misc]
    """The one adapter that there is here, with fewer passes over what the layer returns: its small product is scaled
    instead of the large one, which is added up in place of being made and added.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        low = self.lora_A["default"](self.lora_dropout["default"](x)) * self.scaling["default"]
        weight = self.lora_B["default"].weight
        return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), weight.T).view_as(result)


def use_float_layers(model: PreTrainedModel, adapter: PeftModel) -> None:
    """Switches an adapter's linear layers to it where base and adapter are float32."""
    if model.dtype != torch.float32:
        return
    for layer in adapter.modules():
        if type(layer) is LoraLinear and layer.lora_A["default"].weight.dtype == torch.float32:
            layer.__class__ = FloatLoraLinear
