"""PEFT's LoRA layer where everything is float32: the adapter is added by the product that computes it."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from transformers import PreTrainedModel

from trainer_svc.worker.adapters.lora_dropout import low_of_kept


class FloatLoraLinear(LoraLinear):  # type: ignore[misc]
    """The one adapter that there is here, with fewer passes over what the layer returns: its small product is scaled
    instead of the large one, which is added up in place of being made and added; what dropout keeps is a byte an input.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dropout, weight = self.lora_dropout["default"], self.lora_B["default"].weight
        if isinstance(dropout, torch.nn.Dropout) and dropout.training:
            low = low_of_kept(x, self.lora_A["default"].weight, dropout.p)
        else:
            low = self.lora_A["default"](x)
        low = low * self.scaling["default"]
        return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), weight.T).view_as(result)


def use_float_layers(model: PreTrainedModel, adapter: PeftModel) -> None:
    """Switches an adapter's linear layers to it where base and adapter are float32."""
    if model.dtype != torch.float32:
        return
    for layer in adapter.modules():
        if type(layer) is LoraLinear and layer.lora_A["default"].weight.dtype == torch.float32:
            layer.__class__ = FloatLoraLinear
