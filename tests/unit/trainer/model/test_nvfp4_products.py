"""NVFP4 as products take it: against the format's definition in float64, torchao and cuBLAS's layout; and the proof of
a card's products, which finds wrong ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from trainer_svc.worker.nvfp4.operand import E4M3, Operand, Weight, rows
from trainer_svc.worker.nvfp4.product import by_card, exact, in_tiles
from trainer_svc.worker.nvfp4.proof import fault_of
from trainer_svc.worker.quantized import e2m1

CPU = torch.device("cpu")
MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
GRID = torch.cat([MAGNITUDES, -MAGNITUDES[1:]])
SCALES = torch.tensor(  # E4M3's positive values: m/8 of 2^-6, and (1 + m/8) 2^(e - 7) up to 448
    [m * 2.0**-9 for m in range(1, 8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1],
    dtype=torch.float64,
)


def matrix(count: int, width: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, width, generator=generator)
    uneven = torch.rand(count, width // 16, generator=generator).mul(12).sub(8).exp2().repeat_interleave(16, 1)
    return (values * uneven * size).to(dtype)


def meant(operand: Operand) -> torch.Tensor:
    return operand.unscaled().double() * operand.scale.double()


def nearest(values: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
    return choices[(values[..., None] - choices).abs().argmin(-1)]


def assert_defined(operand: Operand, given: torch.Tensor, blocks: torch.Tensor) -> None:
    """What a matrix became is what the format says: `blocks` has the values that share its scales, [R, K / 16, n]."""
    largest = given.double().abs().max() / (6 * 448)
    torch.testing.assert_close(operand.scale.double(), largest, rtol=1e-6, atol=0)
    scales = operand.scales.double()
    wanted = (blocks.double().abs().amax(-1) / 6 / largest).clamp(2**-9, 448)
    # Computed in float32, a value midway between two may go to either.
    off = (scales - wanted).abs() - (nearest(wanted, SCALES) - wanted).abs()
    assert bool((off <= 1e-6 * wanted).all())
    in_units = given.double().unflatten(-1, (-1, 16)) / (scales * operand.scale.double())[..., None]
    found = operand.unscaled().double().unflatten(-1, (-1, 16)) / scales[..., None]
    assert bool(torch.isin(found, GRID).all())
    off = (found - in_units).abs() - (nearest(in_units, GRID) - in_units).abs()
    assert bool((off <= 1e-5).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e20])
def test_rows_have_the_values_and_scales_of_the_definition(dtype: torch.dtype, size: float) -> None:
    given = matrix(37, 96, dtype, size)
    given[3, 16:32] = 0
    found = rows(given)
    assert_defined(found, given, given.unflatten(-1, (-1, 16)))
    assert not meant(found)[3, 16:32].any()
    assert (meant(found) - given.double()).norm() < 0.11 * given.double().norm()


def test_rows_are_those_of_torchao() -> None:
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    given = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    scales, codes = nvfp4_quantize(given, 16, per_tensor_amax_to_scale(given.abs().max()))
    found = rows(given)
    assert torch.equal(found.scales.view(torch.uint8), scales.view(torch.uint8))
    # torchao multiplies by the reciprocal of a scale, which may tip a value that lies midway.
    assert (e2m1.unpacked(found.codes) & 7 == e2m1.unpacked(codes) & 7).float().mean() > 0.999


def test_a_weight_means_the_same_in_both_directions() -> None:
    given = matrix(96, 64)
    weight = Weight.of(given)
    squares = given.unflatten(0, (-1, 16)).unflatten(-1, (-1, 16)).permute(0, 2, 1, 3).flatten(2)
    assert_defined(weight.along_in(), given, squares.repeat_interleave(16, 0))
    assert torch.equal(meant(weight.along_out()), meant(weight.along_in()).T)
    for operand in (weight.along_in(), weight.along_out()):
        assert operand.codes.is_contiguous() and operand.scales.is_contiguous()


@pytest.mark.parametrize("make", [rows, lambda given: rows(given, at_random=True), lambda g: Weight.of(g).along_in()])
def test_zeros_stay_zeros_and_what_is_not_finite_is_seen(make: Callable[[torch.Tensor], Operand]) -> None:
    other = rows(matrix(32, 64))
    assert not exact(make(torch.zeros(32, 64)), other, torch.float32).any()
    for bad in (float("nan"), float("inf"), -float("inf")):
        given = matrix(32, 64)
        given[2, 5] = bad
        assert not exact(make(given), other, torch.float32).isfinite().any()


def test_rounding_at_random_is_right_in_the_mean() -> None:
    torch.manual_seed(0)
    given, times = matrix(3, 32), 4000
    given[0, 0] = 6.4  # the largest of its block, whatever becomes of the block's scale
    draws = meant(rows(given.repeat(times, 1), at_random=True)).view(times, 3, 32)
    error = (draws.mean(0) - given.double()).abs()
    assert bool((error <= 5 * draws.std(0) / times**0.5 + 1e-6 * given.abs()).all())
    # Never further than the two values around.
    scale = rows(given, at_random=True)
    unit = (scale.scales.double() * scale.scale.double()).repeat_interleave(16, 1)
    in_units = given.double() / unit
    assert bool((in_units.abs() <= 6 * (1 + 1e-6)).all())
    steps = torch.where(in_units.abs() < 2, 0.5, torch.where(in_units.abs() < 4, 1.0, 2.0)) * unit
    assert bool(((draws - given.double()).abs() <= steps * (1 + 1e-5)).all())


def test_what_the_format_has_is_left_by_rounding_at_random() -> None:
    torch.manual_seed(0)
    given = GRID.float().repeat(50)[:736].view(23, 32) * 448  # each block has a 6, so that scales are 448 and 1
    for _ in range(20):
        assert torch.equal(meant(rows(given, at_random=True)).float(), given)


@pytest.mark.parametrize("shape", [(128, 4), (333, 22), (96, 7), (1, 1)], ids=str)
def test_scales_lie_as_cublas_documents_and_as_torchao_lays_them(shape: tuple[int, int]) -> None:
    from torchao.prototype.mx_formats.utils import to_blocked

    scales = torch.randint(1, 127, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8).view(E4M3)
    found = in_tiles(scales)
    assert torch.equal(found.view(torch.uint8), to_blocked(scales).view(torch.uint8))
    assert torch.equal(from_tiles(found, *shape), scales.float())


def from_tiles(flat: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """Scales [count, width] out of cuBLAS's layout, by the formula of its documentation."""
    row, column = torch.arange(count)[:, None], torch.arange(width)[None]
    tile = row // 128 * -(-width // 4) + column // 4
    place = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
    return flat.float()[place]


def fake_scaled_mm(a: torch.Tensor, b: torch.Tensor, *args: Any, output_dtype: torch.dtype) -> torch.Tensor:
    """torch's product as its documentation and cuBLAS's have it, in float64: values from bytes, scales from tiles."""
    scale_a, recipe_a, scale_b, recipe_b, swizzle_a, swizzle_b = args
    for recipe, swizzle in ((recipe_a, swizzle_a), (recipe_b, swizzle_b)):
        assert recipe == [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
        assert swizzle == [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    assert a.dtype == b.dtype == torch.float4_e2m1fn_x2
    assert a.is_contiguous() and b.T.is_contiguous()  # row-major times column-major
    assert a.shape[1] % 16 == b.shape[0] % 16 == b.shape[1] % 16 == 0

    def values(packed: torch.Tensor, scale: list[torch.Tensor]) -> torch.Tensor:
        pairs = packed.view(torch.uint8)
        codes = torch.stack([pairs % 16, pairs // 16], -1).flatten(1).long()
        found = torch.cat([MAGNITUDES, -MAGNITUDES])[codes]
        assert scale[0].is_contiguous() and scale[1].dtype == torch.float32 and scale[1].dim() == 0
        return found * from_tiles(scale[0], len(codes), codes.shape[1] // 16).repeat_interleave(16, 1) * scale[1]

    return (values(a, scale_a) @ values(b.T, scale_b).T).to(output_dtype)


def test_a_card_is_asked_for_the_exact_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_mm", fake_scaled_mm)
    assert fault_of(by_card, CPU) is None
    a, b = rows(matrix(37, 64)), Weight.of(matrix(96, 64)).along_in()
    torch.testing.assert_close(by_card(a, b, torch.float32), exact(a, b, torch.float32))
    torch.testing.assert_close(exact(a, b, torch.float32).double(), meant(a) @ meant(b).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torch_takes_what_a_card_is_asked_for(dtype: torch.dtype) -> None:
    """Its own checks of formats, sizes and layouts, for a card that need not be there."""

    def operand(count: int, width: int) -> Operand:
        codes = torch.empty(count, width // 2, dtype=torch.uint8, device="cuda")
        return Operand(codes, torch.empty(count, width // 16, dtype=E4M3, device="cuda"), torch.ones((), device="cuda"))

    with FakeTensorMode():
        found = by_card(operand(333, 352), operand(288, 352), dtype)
        assert (found.shape, found.dtype, found.device.type) == ((333, 288), dtype, "cuda")
        with pytest.raises((RuntimeError, ValueError), match="16"):
            by_card(operand(333, 352), operand(280, 352), dtype)


def with_scales(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A product that reads the second matrix's scales in another way."""

    def product(a: Operand, b: Operand, dtype: torch.dtype) -> torch.Tensor:
        return exact(a, replace(b, scales=change(b.scales.view(torch.uint8)).contiguous().view(E4M3)), dtype)

    return product


def one_bit(scales: torch.Tensor) -> torch.Tensor:
    changed = scales.clone()
    changed[17, 5] += 1
    return changed


def by_rows(scales: torch.Tensor) -> torch.Tensor:
    """What a kernel that wants tiles reads where they lie row by row."""
    padded = F.pad(scales, (0, -scales.shape[1] % 4, 0, -scales.shape[0] % 128)).flatten().view(E4M3)
    return from_tiles(padded, *scales.shape).to(E4M3).view(torch.uint8)


WRONG: dict[str, Callable[..., torch.Tensor]] = {
    "scales row by row": with_scales(by_rows),
    "scales of the row below": with_scales(lambda scales: scales.roll(1, 0)),
    "scales of the next 16": with_scales(lambda scales: scales.roll(1, 1)),
    "one scale off by one": with_scales(one_bit),
    "no matrix scale": lambda a, b, dtype: exact(a, replace(b, scale=torch.ones(())), dtype),
    "halves of bytes swapped": lambda a, b, dtype: exact(
        replace(a, codes=a.codes >> 4 | (a.codes & 15) << 4), b, dtype
    ),
    "summed in bfloat16": lambda a, b, dtype: (
        (a.unscaled().bfloat16() @ b.unscaled().bfloat16().T) * (a.scale * b.scale)
    ).to(dtype),
    "right but for float32": lambda a, b, dtype: exact(a, b, torch.bfloat16).to(dtype),
}


@pytest.mark.parametrize("product", WRONG.values(), ids=WRONG)
def test_the_proof_finds_a_wrong_product(product: Callable[..., torch.Tensor]) -> None:
    fault = fault_of(product, CPU)
    assert fault is not None and "of 333 tokens, 352 inputs and 288 outputs differs from the exact product" in fault


def test_the_proof_says_why_a_product_is_refused() -> None:
    fault = fault_of(by_card, CPU)
    assert fault is not None and fault.startswith("x Wᵀ of 333 tokens, 352 inputs and 288 outputs is refused: CPU")


def test_the_proof_takes_no_random_numbers_of_the_run() -> None:
    before = torch.get_rng_state()
    assert fault_of(exact, CPU, [(40, 64, 96), (64, 32, 160)]) is None
    assert torch.equal(torch.get_rng_state(), before)
