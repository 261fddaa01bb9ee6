"""silu(gate) · up with what adapters add to both, and its gradient, in one pass over the outputs each, for CUDA.

Legend: T tokens, F features of the gate and of up, r rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TOKENS, _FEATURES = 32, 128


def gated(y: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """See gated.py."""
    result = y.new_empty(len(y), y.shape[1] // 2)
    _run(y, low, b, None, result)
    return result


def gated_gradient(y: torch.Tensor, low: torch.Tensor, b: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """See gated.py."""
    result = torch.empty_like(y)
    _run(y, low, b, gradient, result)
    return result


def _run(
    y: torch.Tensor, low: torch.Tensor, b: torch.Tensor, gradient: torch.Tensor | None, result: torch.Tensor
) -> None:
    tokens, features, rank = len(y), y.shape[1] // 2, low.shape[1] // 2
    grid = triton.cdiv(tokens, _TOKENS), triton.cdiv(features, _FEATURES)
    block_r = max(16, triton.next_power_of_2(rank))  # the least that matrix units take
    strides = y.stride(0), low.stride(0), b.stride(0)
    _kernel[grid](
        y, low, b, gradient, result, tokens, features, rank, *strides, _TOKENS, _FEATURES, block_r, num_warps=4
    )


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    y,
    low,
    b,
    gradient,
    result,
    tokens,
    features,
    rank,
    y_stride,
    low_stride,
    b_stride,
    block_t: tl.constexpr,
    block_f: tl.constexpr,
    block_r: tl.constexpr,
):
    """Without `gradient` silu(gate) · up of a tile, else the gradients with respect to gate and up."""
    token = (tl.program_id(0) * block_t + tl.arange(0, block_t)).to(tl.int64)[:, None]
    feature = (tl.program_id(1) * block_f + tl.arange(0, block_f))[None, :]
    inner = tl.arange(0, block_r)
    inside = (token < tokens) & (feature < features)
    left = low + token * low_stride + inner[None, :]
    left_inside = (token < tokens) & (inner[None, :] < rank)
    right = b + feature.to(tl.int64) * b_stride + inner[:, None]
    right_inside = (feature < features) & (inner[:, None] < rank)
    gate = tl.load(y + token * y_stride + feature, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(y + token * y_stride + features + feature, mask=inside, other=0.0).to(tl.float32)
    gate += tl.dot(
        tl.load(left, mask=left_inside, other=0.0), tl.load(right, mask=right_inside, other=0.0), input_precision="ieee"
    )
    up += tl.dot(
        tl.load(left + rank, mask=left_inside, other=0.0),
        tl.load(right + features.to(tl.int64) * b_stride + rank, mask=right_inside, other=0.0),
        input_precision="ieee",
    )
    open_ = tl.sigmoid(gate)
    if gradient is None:
        value = gate * open_ * up
        tl.store(result + token * features + feature, value.to(result.dtype.element_ty), mask=inside)
    else:
        given = tl.load(gradient + token * features + feature, mask=inside, other=0.0).to(tl.float32)
        to_gate = given * up * open_ * (1 + gate * (1 - open_))
        to_up = given * gate * open_
        place = result + token * (2 * features) + feature
        tl.store(place, to_gate.to(result.dtype.element_ty), mask=inside)
        tl.store(place + features, to_up.to(result.dtype.element_ty), mask=inside)
