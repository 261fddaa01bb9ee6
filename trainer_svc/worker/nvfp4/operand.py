"""Matrices in NVFP4, as products take them: E2M1 values, an E4M3 scale for each 16 of a row, one float32 scale.

What is rounded how follows NVIDIA's recipe (Pretraining Large Language Models with NVFP4, arXiv:2509.25149). Legend: R
rows, K the dimension that a product sums over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer_svc.worker.quantized import e2m1

BLOCK = 16
"""Values of a row that share a scale."""

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E4M3_SMALLEST = 2.0**-9


@dataclass(frozen=True)
class Operand:
    """A matrix [R, K]: `codes` uint8 [R, K / 2], two a byte; `scales` E4M3 [R, K / 16]; `scale` float32, 0-d."""

    codes: torch.Tensor
    scales: torch.Tensor
    scale: torch.Tensor

    def unscaled(self) -> torch.Tensor:
        """The matrix without `scale`, [R, K], exact in float32."""
        blocks = _blocks(e2m1.decoded(e2m1.unpacked(self.codes)))
        return (blocks * self.scales.float()[..., None]).flatten(-2)


def rows(matrix: torch.Tensor, *, at_random: bool = False) -> Operand:
    """A matrix [R, K], K a multiple of 16, to the nearest values, ties to the even one.

    `at_random`: up or down in proportion, so that the mean is right, by the device's own generator. Scales are rounded
    up then: a value beyond the largest would come out too small each time.
    """
    blocks = _blocks(matrix.float())
    scale = _matrix_scale(matrix)
    scales = _block_scales(blocks.abs().amax(-1), scale, up=at_random)
    values = blocks / (scales.float() * scale)[..., None]
    codes = e2m1.nearest(_at_random(values) if at_random else values)
    return Operand(e2m1.packed(codes.flatten(-2)), scales, scale)


@dataclass(frozen=True)
class Weight:
    """A weight [out, in] whose scales are those of squares of 16 by 16: transposed it means the same.

    `codes`: uint8 [out, in]. `scales`: E4M3 [out / 16, in / 16].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Weight:
        """A weight whose sides are multiples of 16, to the nearest values."""
        outputs, inputs = weight.shape
        squares = weight.float().reshape(outputs // BLOCK, BLOCK, inputs // BLOCK, BLOCK)
        scale = _matrix_scale(weight)
        scales = _block_scales(squares.abs().amax((1, 3)), scale)
        values = squares / (scales.float() * scale)[:, None, :, None]
        return cls(e2m1.nearest(values).flatten(2).flatten(0, 1), scales, scale)

    def along_in(self) -> Operand:
        """For products that sum over the inputs: [out, in]."""
        return Operand(e2m1.packed(self.codes), _spread(self.scales), self.scale)

    def along_out(self) -> Operand:
        """For products that sum over the outputs: [in, out]."""
        return Operand(e2m1.packed(self.codes.T.contiguous()), _spread(self.scales.T.contiguous()), self.scale)


def _blocks(matrix: torch.Tensor) -> torch.Tensor:
    """[R, K] → [R, K / 16, 16]."""
    return matrix.reshape(len(matrix), -1, BLOCK)


def _spread(scales: torch.Tensor) -> torch.Tensor:
    """The scales of squares for each row of theirs."""
    return scales.view(torch.uint8).repeat_interleave(BLOCK, 0).view(E4M3)


def _matrix_scale(matrix: torch.Tensor) -> torch.Tensor:
    """What lets the largest scale of a block be E4M3's largest; 1 for zeros alone; not finite if a value is not."""
    largest = torch.maximum(matrix.amax(), -matrix.amin()).float()
    return torch.where(largest == 0, 1.0, largest / (e2m1.LARGEST * E4M3_MAX))


def _block_scales(largest: torch.Tensor, scale: torch.Tensor, *, up: bool = False) -> torch.Tensor:
    """Scales for blocks by their largest magnitudes: those that make it 6, in E4M3, the nearest or the next above."""
    exact = (largest / e2m1.LARGEST / scale).clamp(E4M3_SMALLEST, E4M3_MAX)
    stored = exact.to(E4M3)
    if up:  # of two positive E4M3 that follow each other, so do the bytes
        stored = (stored.view(torch.uint8) + (stored.float() < exact)).view(E4M3)
    return stored


def _at_random(values: torch.Tensor) -> torch.Tensor:
    """One of the two E2M1 values around each, the nearer one more often."""
    size = values.abs().clamp(max=e2m1.LARGEST)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    low = (size / step).floor()
    high = torch.rand(size.shape, device=size.device) < size / step - low
    return torch.copysign((low + high) * step, values)
