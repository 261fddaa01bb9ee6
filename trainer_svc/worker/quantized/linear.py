"""A frozen linear layer whose weight is stored in few bits and decoded when it is needed, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from trainer_svc.worker.quantized.storage import Parts, Storage
from trainer_svc.worker.shares import whole


class QuantizedLinear(torch.nn.Linear):
    """`weight` is the packed values, uint8; the storage's other parts are buffers. A Linear, so that peft adapts it."""

    def __init__(self, in_features: int, out_features: int, bias: bool, storage: Storage) -> None:
        with torch.device("meta"):
            super().__init__(in_features, out_features, bias=bias)
        self.weight.requires_grad_(False)
        self.storage = storage

    @classmethod
    def of(cls, layer: torch.nn.Linear, storage: Storage) -> QuantizedLinear:
        """The layer, quantised."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, storage)
        made.bias = layer.bias
        made.store(layer.weight.detach())
        return made

    def store(self, weight: torch.Tensor) -> None:
        """Takes a matrix [out, in] as its weight."""
        parts = self.storage.encode(weight)
        self.weight = torch.nn.Parameter(parts.pop("weight"), requires_grad=False)
        for name, value in parts.items():
            self.register_buffer(name, value)

    def scales_as_weights(self) -> None:
        """Makes the other parts frozen parameters: FSDP2 cuts those into shares, and leaves buffers whole."""
        for name in self.storage.parts:
            value = self._buffers.get(name)
            if value is not None and value.dim() > 0:
                del self._buffers[name]
                self.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))

    def full_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in] that is computed with. While its parts are in shares, all ranks must ask for it."""
        stored = {name: getattr(self, name) for name in ("weight", *self.storage.parts) if hasattr(self, name)}
        parts: Parts = {name: whole(value.detach()) for name, value in stored.items()}
        return self.storage.decode(parts, torch.Size((self.out_features, self.in_features)), dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in torch's own class
        """Linear in the format that is computed in: autocast's, inside it, else the input's."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        result: torch.Tensor = _FrozenLinear.apply(input.to(dtype), self, dtype)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, storage={self.storage}"


class _FrozenLinear(torch.autograd.Function):
    """x → x Wᵀ + b. Keeps nothing of the size of W: the backward pass decodes it again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear, dtype: torch.dtype) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, layer.full_weight(dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0].to(ctx.dtype) @ ctx.layer.full_weight(ctx.dtype), None, None
