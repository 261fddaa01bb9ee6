"""The formats that frozen weights are stored in: how a matrix becomes bytes, and the matrix that these mean.

What a format decodes to *is* the base model: forward, backward, merge and what inference is given all use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch.nn import functional as F

from surogate.config.train import TrainConfig
from trainer_svc.worker.quantized import e2m1
from trainer_svc.worker.quantized.bitsandbytes_library import load_bitsandbytes

Parts = dict[str, torch.Tensor]
"""The tensors of one stored matrix. `weight` is its packed values, uint8; the others are scales."""

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0

CHUNK_ELEMENTS = 1 << 18
"""Weights that are encoded at a time."""

CPU_CHUNK_ELEMENTS = 1 << 14
"""The same on a CPU: what encodes them stays in its caches, and below what `memory.freed_at_once` gives back."""


class Storage(Protocol):
    """A format."""

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    """Names of the tensors beside `weight`."""

    def encode(self, weight: torch.Tensor) -> Parts:
        """The nearest that the format has to a matrix [out, in]."""
        ...

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [out, in] that the parts mean, rounded once to `dtype`."""
        ...


@dataclass(frozen=True)
class Nf4:
    """bitsandbytes' NF4 (Dettmers et al., 2023): 16 values, and a scale for each `block_size` of them, itself in 8 bits
    with `double_quant`.
    """

    block_size: int = 64
    double_quant: bool = True
    name: ClassVar[str] = "nf4"
    parts: ClassVar[tuple[str, ...]] = ("absmax", "nested_absmax", "nested_offset")

    def encode(self, weight: torch.Tensor) -> Parts:
        """By bitsandbytes, so many blocks at a time."""
        functional = load_bitsandbytes("qlora_bnb").functional
        packed = torch.empty((-(-weight.numel() // 2), 1), dtype=torch.uint8, device=weight.device)
        chunk, scales = _chunk(weight), []
        for start, values in enumerate(torch.split(weight.reshape(-1), chunk)):
            part, state = functional.quantize_4bit(values, blocksize=self.block_size, quant_type="nf4")
            packed[start * chunk // 2 :][: len(part)] = part
            scales.append(state.absmax)
        absmax = torch.cat(scales)
        if not self.double_quant:
            return {"weight": packed, "absmax": absmax}
        offset = absmax.mean()
        nested, state = functional.quantize_blockwise(absmax - offset, blocksize=256)
        return {"weight": packed, "absmax": nested, "nested_absmax": state.absmax, "nested_offset": offset}

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """By bitsandbytes, block by block: its CPU kernel takes each row to begin with a new block, and in a matrix
        whose rows are no multiple of the block they do not.
        """
        functional = load_bitsandbytes("qlora_bnb").functional
        packed, count = parts["weight"], shape.numel()
        blocks = (count // self.block_size, self.block_size) if count % self.block_size == 0 else (count,)
        nested = None
        if self.double_quant:
            nested = functional.QuantState(
                absmax=parts["nested_absmax"], blocksize=256, code=_nested_code(packed.device), dtype=torch.float32
            )
        state = functional.QuantState(
            absmax=parts["absmax"],
            shape=torch.Size(blocks),
            code=_nf4_code(packed.device),
            blocksize=self.block_size,
            quant_type="nf4",
            dtype=dtype,
            offset=parts.get("nested_offset"),
            state2=nested,
        )
        weight: torch.Tensor = functional.dequantize_4bit(packed, state)
        return weight.view(shape)


@dataclass(frozen=True)
class Fp8:
    """E4M3 values, and a float32 scale for each square of `block_size` by `block_size` of them: the largest value of a
    square becomes 448, the largest of the format.
    """

    block_size: int = 128
    name: ClassVar[str] = "fp8"
    parts: ClassVar[tuple[str, ...]] = ("scale",)

    def encode(self, weight: torch.Tensor) -> Parts:
        """The values are divided by their scales and rounded to the nearest, ties to even."""
        size = self.block_size
        packed = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        scales = []
        for rows in _slices(weight, size):
            part = weight[rows].float()
            squares = _padded(part, size, size).unfold(0, size, size).unfold(1, size, size)
            scale = torch.maximum(squares.amax((-1, -2)), -squares.amin((-1, -2))) / E4M3_MAX
            scale = torch.where(scale > 0, scale, 1.0)
            values = (part / self._spread(scale, part.shape)).clamp(-E4M3_MAX, E4M3_MAX)
            packed[rows] = values.to(E4M3).view(torch.uint8)
            scales.append(scale)
        return {"weight": packed, "scale": torch.cat(scales)}

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Value times scale, in float32."""
        return (parts["weight"].view(E4M3).float() * self._spread(parts["scale"], shape)).to(dtype)

    def _spread(self, scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The scale of each element."""
        rows = scale.repeat_interleave(self.block_size, 0)[: shape[0]]
        return rows.repeat_interleave(self.block_size, 1)[:, : shape[1]]


@dataclass(frozen=True)
class Nvfp4:
    """E2M1 values, an E4M3 scale for each 16 of a row, and a float32 scale for the matrix.

    With `four_over_six` (Cook et al., 2025, arXiv:2512.02010) each block's largest value becomes 6 or 4, whichever
    leaves the smaller squared error: the step from 4 to 6 is a wide one.
    """

    four_over_six: bool = True
    name: ClassVar[str] = "nvfp4"
    parts: ClassVar[tuple[str, ...]] = ("scale", "matrix_scale")
    block: ClassVar[int] = 16

    def encode(self, weight: torch.Tensor) -> Parts:
        """The matrix scale lets the largest block scale be E4M3's largest; 256 where it may grow by a half."""
        largest = torch.maximum(weight.amax(), -weight.amin()).float()
        matrix_scale = largest / (e2m1.LARGEST * (256.0 if self.four_over_six else E4M3_MAX))
        matrix_scale = torch.where(matrix_scale > 0, matrix_scale, 1.0)
        blocks = -(-weight.shape[1] // self.block)
        packed = torch.empty((weight.shape[0], blocks * self.block // 2), dtype=torch.uint8, device=weight.device)
        scales = torch.empty((weight.shape[0], blocks), dtype=torch.uint8, device=weight.device)
        for rows in _slices(weight, 1):
            codes, scale = self._encode_rows(weight[rows].float(), matrix_scale)
            packed[rows] = e2m1.packed(codes)
            scales[rows] = scale.view(torch.uint8)
        return {"weight": packed, "scale": scales, "matrix_scale": matrix_scale.reshape(1)}

    def _encode_rows(self, weight: torch.Tensor, matrix_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [rows, in] and scales [rows, blocks]."""
        blocks = _padded(weight, 1, self.block).reshape(len(weight), -1, self.block)
        largest = blocks.abs().amax(-1)
        codes, scale = _encode_blocks(blocks, largest / e2m1.LARGEST / matrix_scale, matrix_scale)
        if self.four_over_six:
            other_codes, other_scale = _encode_blocks(blocks, largest / 4.0 / matrix_scale, matrix_scale)
            error, other = (
                (e2m1.decoded(c) * (s.float() * matrix_scale)[..., None] - blocks).square().sum(-1)
                for c, s in ((codes, scale), (other_codes, other_scale))
            )
            better = other < error
            codes = torch.where(better[..., None], other_codes, codes)
            scale = torch.where(better, other_scale.float(), scale.float()).to(E4M3)
        return codes.flatten(1), scale

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Value times both scales, in float32."""
        packed = parts["weight"]
        byte = torch.arange(256, device=packed.device)
        pairs = e2m1.decoded(e2m1.unpacked(byte[:, None]))  # what each byte means, [256, 2]
        scale = parts["scale"].view(E4M3).float() * parts["matrix_scale"]
        values = pairs[packed.int()].view(len(packed), -1, self.block) * scale[..., None]
        return values.flatten(1)[:, : shape[1]].to(dtype)


def _encode_blocks(
    blocks: torch.Tensor, scale: torch.Tensor, matrix_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [out, blocks, 16] and E4M3 scales [out, blocks] for the scales that would be exact."""
    smallest = torch.finfo(E4M3).smallest_normal / 8  # the smallest subnormal: a block is never divided by 0
    stored = scale.clamp(smallest, E4M3_MAX).to(E4M3)
    return e2m1.nearest(blocks / (stored.float() * matrix_scale)[..., None]), stored


def _slices(weight: torch.Tensor, multiple: int) -> Iterator[slice]:
    """Rows to encode at a time, a multiple of `multiple`: few enough that their copies in float32 do not matter."""
    rows = max(1, _chunk(weight) // (weight.shape[1] * multiple)) * multiple
    return (slice(start, start + rows) for start in range(0, weight.shape[0], rows))


def _chunk(weight: torch.Tensor) -> int:
    return CPU_CHUNK_ELEMENTS if weight.device.type == "cpu" else CHUNK_ELEMENTS


def _padded(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Zeros added below and to the right, up to multiples."""
    return F.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))


_CODES: dict[tuple[str, torch.device], torch.Tensor] = {}


def _nf4_code(device: torch.device) -> torch.Tensor:
    return _code("nf4", device)


def _nested_code(device: torch.device) -> torch.Tensor:
    return _code("dynamic", device)


def _code(name: str, device: torch.device) -> torch.Tensor:
    """One of bitsandbytes' tables of values, made once for each device."""
    if (name, device) not in _CODES:
        functional = load_bitsandbytes("qlora_bnb").functional
        made: Any = functional.get_4bit_type("nf4", device=device) if name == "nf4" else functional.create_dynamic_map()
        _CODES[name, device] = made.to(device)
    return _CODES[name, device]


def storage_of(train: TrainConfig) -> Storage | None:
    """The format that a configuration asks for; None for weights as they are."""
    if train.qlora_bnb:
        return Nf4(train.qlora_bnb_block_size, train.qlora_bnb_double_quant)
    if train.qlora_fp8:
        return Fp8(train.qlora_block_size)
    return Nvfp4(train.qlora_four_over_six) if train.qlora_fp4 else None
