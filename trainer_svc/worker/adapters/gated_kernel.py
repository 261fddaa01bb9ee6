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
    _forward[_grid(result)](y, low, b, result, *result.shape, low.shape[1] // 2, *_strides(y, low, b), **_tiles(low))
    return result


def gated_gradient(y: torch.Tensor, low: torch.Tensor, b: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """See gated.py."""
    result = torch.empty_like(y)
    size, rank = gradient.shape, low.shape[1] // 2
    _backward[_grid(gradient)](y, low, b, gradient, result, *size, rank, *_strides(y, low, b), **_tiles(low))
    return result


def _grid(result: torch.Tensor) -> tuple[int, int]:
    return triton.cdiv(result.shape[0], _TOKENS), triton.cdiv(result.shape[1], _FEATURES)


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [tensor.stride(0) for tensor in tensors]


def _tiles(low: torch.Tensor) -> dict[str, int]:
    rank = max(16, triton.next_power_of_2(low.shape[1] // 2))  # the least that matrix units take
    return {"block_t": _TOKENS, "block_f": _FEATURES, "block_r": rank, "num_warps": 4}


@triton.jit  # type: ignore[untyped-decorator]
def _inputs(  # type: ignore[no-untyped-def]
    y,
    low,
    b,
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
    """Places [block_t, 1] and [1, block_f] of a tile, which are inside, and gate and up with what adapters add."""
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
    return token, feature, inside, gate, up


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    y,
    low,
    b,
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
    token, feature, inside, gate, up = _inputs(
        y, low, b, tokens, features, rank, y_stride, low_stride, b_stride, block_t, block_f, block_r
    )
    value = gate * tl.sigmoid(gate) * up
    tl.store(result + token * features + feature, value.to(result.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
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
    token, feature, inside, gate, up = _inputs(
        y, low, b, tokens, features, rank, y_stride, low_stride, b_stride, block_t, block_f, block_r
    )
    given = tl.load(gradient + token * features + feature, mask=inside, other=0.0).to(tl.float32)
    open_ = tl.sigmoid(gate)
    to_gate = given * up * open_ * (1 + gate * (1 - open_))
    to_up = given * gate * open_
    place = result + token * (2 * features) + feature
    tl.store(place, to_gate.to(result.dtype.element_ty), mask=inside)
    tl.store(place + features, to_up.to(result.dtype.element_ty), mask=inside)
