"""What an adapter adds to the weight that it is on."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper

from trainer_svc.worker.shares import whole


def product(module: LoraLayer) -> torch.Tensor:
    """s·B·A in float32, shaped like the weight. All ranks must ask for it.

    PEFT has the same, rounded to the format of the adapter, or of the experts' weights.
    """
    scale: float = module.scaling["default"]
    if "default" in module.lora_embedding_A:
        a, b = _float(module.lora_embedding_A["default"]), _float(module.lora_embedding_B["default"])
        return (b @ a).T * scale
    a, b = _float(module.lora_A["default"].weight), _float(module.lora_B["default"].weight)
    experts = module.num_experts if isinstance(module, ParamWrapper) else 1
    if experts > 1:
        a, b = a.reshape(experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, experts)
        swapped = module._did_swap_in_out_features
        return torch.einsum("oke,eki->eoi" if swapped else "oke,eki->eio", b, a) * scale
    added = b @ a
    return (added.T if getattr(module, "fan_in_fan_out", False) else added) * scale


def _float(weight: torch.Tensor) -> torch.Tensor:
    return whole(weight.detach()).float()
