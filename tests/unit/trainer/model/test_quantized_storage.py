"""Formats of quantised weights against bitsandbytes, torchao and their definitions, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from trainer_svc.worker.quantized.storage import Fp8, Nf4, Nvfp4, Storage

SHAPES = [(64, 128), (96, 80), (5, 38)]
"""Rows of whole blocks, rows that end within a block, and a matrix that does."""


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 0.05).to(dtype)


def through(storage: Storage, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return storage.decode(storage.encode(weight), weight.shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_is_that_of_bitsandbytes(dtype: torch.dtype, double_quant: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    weight = matrix((600, 512), dtype)  # more than is encoded at a time
    theirs = Params4bit(
        weight, requires_grad=False, blocksize=64, compress_statistics=double_quant, quant_type="nf4"
    ).to("cpu")
    expected = dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(through(Nf4(64, double_quant), weight, dtype), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [64, 128])
def test_nf4_is_its_16_values_times_the_largest_of_a_block(shape: tuple[int, int], block_size: int) -> None:
    from bitsandbytes.functional import get_4bit_type

    weight = matrix(shape)
    parts = Nf4(block_size, double_quant=False).encode(weight)
    packed = parts["weight"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[: weight.numel()].long()
    values = get_4bit_type("nf4", device="cpu")[codes]
    scales = [block.abs().max() for block in weight.flatten().split(block_size)]
    expected = torch.cat([block * s for block, s in zip(values.split(block_size), scales, strict=True)])
    assert torch.equal(through(Nf4(block_size, double_quant=False), weight), expected.view(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_is_e4m3_times_the_scale_of_its_square(shape: tuple[int, int]) -> None:
    weight, size = matrix(shape), 32
    expected = torch.empty_like(weight)
    for row, column in itertools.product(range(0, shape[0], size), range(0, shape[1], size)):
        tile = weight[row : row + size, column : column + size]
        scale = tile.abs().max() / 448
        expected[row : row + size, column : column + size] = (tile / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(through(Fp8(size), weight), expected)
    assert (expected - weight).norm() / weight.norm() < 0.04


def test_nvfp4_without_a_choice_is_torchaos() -> None:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    weight = matrix((64, 128))
    theirs = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().max()))
    ours = through(Nvfp4(four_over_six=False), weight)
    # torchao multiplies by the reciprocal of a scale, which may tip a value that lies midway: hardly any, by one step.
    same = ours == theirs.dequantize(torch.float32)
    assert same.float().mean() > 0.999
    torch.testing.assert_close(ours, theirs.dequantize(torch.float32), rtol=0.5, atol=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_nvfp4_takes_the_nearest_value_and_the_better_scale(shape: tuple[int, int]) -> None:
    weight = matrix(shape)
    parts = Nvfp4().encode(weight)
    found = through(Nvfp4(), weight)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6])
    scales = parts["scale"].view(torch.float8_e4m3fn).float() * parts["matrix_scale"]
    largest = weight.abs().max() / (6 * 256)
    assert torch.equal(parts["matrix_scale"], largest.reshape(1))
    for row in range(shape[0]):
        for index, block in enumerate(weight[row].split(16)):
            got = found[row, 16 * index : 16 * index + len(block)]
            choices = []
            for top in (6, 4):
                scale = (block.abs().max() / top / largest).clamp(2**-9, 448).to(torch.float8_e4m3fn).float() * largest
                nearest = grid[((block / scale)[:, None] - grid).abs().argmin(-1)] * scale
                choices.append(((nearest - block).square().sum(), scale))
            error, scale = min(choices, key=lambda choice: float(choice[0]))
            assert torch.isclose((got - block).square().sum(), error, rtol=1e-4)
            assert torch.isclose(scales[row, index], scale)


def test_four_over_six_leaves_a_smaller_error() -> None:
    weight = matrix((64, 128))
    errors = [float((through(Nvfp4(choice), weight) - weight).norm()) for choice in (True, False)]
    assert errors[0] < 0.95 * errors[1]


def test_ties_go_to_the_even_code() -> None:
    block = torch.tensor([[6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, 0]])
    expected = torch.tensor([[6, 0, 1, 1, 2, 2, 4, 4, 0, -1, -1, -2, -2, -4, -4, 0]])
    found = through(Nvfp4(four_over_six=False), block * 448)  # the scales are 1 and 448 then, and nothing is rounded
    torch.testing.assert_close(found, expected.float() * 448, rtol=0, atol=0)


@pytest.mark.parametrize("storage", [Nf4(), Fp8(), Nvfp4()], ids=lambda storage: storage.name)
def test_zero_stays_zero_and_sizes_are_as_documented(storage: Storage) -> None:
    assert not through(storage, torch.zeros(16, 64)).any()
    parts = storage.encode(matrix((256, 512)))
    bits = 8 * sum(part.numel() * part.element_size() for part in parts.values()) / (256 * 512)
    assert bits == pytest.approx({"nf4": 4.13, "fp8": 8.0, "nvfp4": 4.5}[storage.name], abs=0.02)
