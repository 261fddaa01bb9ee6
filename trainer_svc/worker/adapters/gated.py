"""silu(gate) · up, of gate and up that lie side by side and to which adapters still add their part.

`y[T, 2F]`: what the base makes of both. `low[T, 2r]`: what the adapters' A make. `b[2F, 2r]`: their B on a diagonal.
Operations of their own, so that a compiler leaves them whole.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

torch.library.define("surogate::gated", "(Tensor y, Tensor low, Tensor b) -> Tensor")
torch.library.define("surogate::gated_gradient", "(Tensor y, Tensor low, Tensor b, Tensor gradient) -> Tensor")


@torch.library.impl("surogate::gated", "CompositeExplicitAutograd")
def _gated(y: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, [T, F]."""
    if y.is_cuda:
        from trainer_svc.worker.adapters import gated_kernel  # Triton, which a CPU may be without

        return gated_kernel.gated(y, low, b)
    gate, up = _with_adapters(y, low, b)
    return F.silu(gate) * up


@torch.library.impl("surogate::gated_gradient", "CompositeExplicitAutograd")
def _gated_gradient(y: torch.Tensor, low: torch.Tensor, b: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient [T, 2F] with respect to gate and up, from that of `gated` [T, F]."""
    if y.is_cuda:
        from trainer_svc.worker.adapters import gated_kernel

        return gated_kernel.gated_gradient(y, low, b, gradient.contiguous())
    gate, up = _with_adapters(y, low, b)
    share = torch.sigmoid(gate)
    return torch.cat([gradient * up * share * (1 + gate * (1 - share)), gradient * gate * share], -1)


@torch.library.register_fake("surogate::gated")  # type: ignore[untyped-decorator]
def _gated_shape(y: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    del low, b
    return y.new_empty(y.shape[0], y.shape[1] // 2)


@torch.library.register_fake("surogate::gated_gradient")  # type: ignore[untyped-decorator]
def _gated_gradient_shape(y: torch.Tensor, low: torch.Tensor, b: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    del low, b, gradient
    return torch.empty_like(y)


def _with_adapters(y: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = torch.addmm(y, low, b.T).chunk(2, -1)
    return gate, up
