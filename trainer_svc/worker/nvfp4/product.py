"""The product of two matrices in NVFP4: by the tensor cores of a card, and exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from trainer_svc.worker.nvfp4.operand import Operand

MULTIPLE = 32
"""What the sides of a product must be a multiple of: cuBLAS reads 16 bytes at a time. Rows of the first may be any."""

Product = Callable[[Operand, Operand, torch.dtype], torch.Tensor]
"""`(a[M, K], b[N, K], dtype) → a bᵀ [M, N]`, summed in float32 and rounded once to `dtype`."""


def by_card(a: Operand, b: Operand, dtype: torch.dtype) -> torch.Tensor:
    """By cuBLAS, on a card of compute capability 10.0 and above. `dtype`: bfloat16 or float32."""
    levels = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    layouts = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    return F.scaled_mm(
        a.codes.view(torch.float4_e2m1fn_x2),
        b.codes.view(torch.float4_e2m1fn_x2).T,
        [in_tiles(a.scales), a.scale],
        levels,
        [in_tiles(b.scales), b.scale],
        levels,
        layouts,
        layouts,
        output_dtype=dtype,
    )


def exact(a: Operand, b: Operand, dtype: torch.dtype) -> torch.Tensor:
    """What `by_card` is to give, on any device."""
    with torch.autocast(a.codes.device.type, enabled=False):
        return (a.unscaled() @ b.unscaled().T * (a.scale * b.scale)).to(dtype)


def in_tiles(scales: torch.Tensor) -> torch.Tensor:
    """E4M3 scales [R, C] as cuBLAS reads them, flat: tiles of 128 rows by 4 columns, filled up with zeros.

    In a tile the four rows r, r + 32, r + 64 and r + 96 lie side by side (cuBLAS documentation, "1D block scaling
    factors layout").
    """
    bytes_ = F.pad(scales.view(torch.uint8), (0, -scales.shape[1] % 4, 0, -scales.shape[0] % 128))
    tiles = bytes_.reshape(len(bytes_) // 128, 4, 32, -1, 4)  # [tile, quarter, r, tile, column]
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scales.dtype)
