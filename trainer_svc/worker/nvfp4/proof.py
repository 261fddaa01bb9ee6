"""Compares a card's NVFP4 products with the exact ones: a wrong layout of scales is an error, not worse training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from trainer_svc.worker.nvfp4.operand import BLOCK, Operand, Weight, rows
from trainer_svc.worker.nvfp4.product import MULTIPLE, Product, exact

Sizes = tuple[int, int, int]
"""Tokens, inputs and outputs of a linear layer."""

ODD: Sizes = (333, 352, 288)
"""Sizes whose scales fill up no tile of the card's layout, in no dimension."""

TOLERANCE = 2.0**-10
"""How far a sum may be off, as a part of the sum of its terms' magnitudes: much more than what adding up in float32
leaves, much less than what one scale in the place of another makes of a sum of `ODD`.
"""

BFLOAT16 = 2.0**-8
"""The largest relative error of rounding to bfloat16."""


def fault_of(product: Product, device: torch.device, sizes: Iterable[Sizes] = (ODD,)) -> str | None:
    """What is wrong with a product, in words; None if it is what it should be in all uses, for all sizes.

    Draws from a generator of its own.
    """
    generator = torch.Generator(device).manual_seed(0)
    for tokens, inputs, outputs in sizes:
        for name, a, b, dtype in _uses(tokens, inputs, outputs, generator):
            of = f"{name} of {tokens} tokens, {inputs} inputs and {outputs} outputs"
            try:
                found = product(a, b, dtype).float()
            except (RuntimeError, ValueError) as error:
                return f"{of} is refused: {str(error).strip().splitlines()[0]}"
            wrong = _excess(found, a, b, dtype)
            if wrong:
                return f"{of} differs from the exact product in {wrong:.2%} of its values"
    return None


def _uses(
    tokens: int, inputs: int, outputs: int, generator: torch.Generator
) -> Iterator[tuple[str, Operand, Operand, torch.dtype]]:
    """The three products of a layer, with the formats that their results have."""
    weight = Weight.of(_uneven(outputs, inputs, generator, height=BLOCK))
    yield "x Wᵀ", rows(_uneven(tokens, inputs, generator)), weight.along_in(), torch.bfloat16
    yield "dy W", rows(_uneven(tokens, outputs, generator)), weight.along_out(), torch.bfloat16
    filled = -(-tokens // MULTIPLE) * MULTIPLE
    dy, x = rows(_uneven(outputs, filled, generator)), rows(_uneven(inputs, filled, generator))
    for dtype in (torch.bfloat16, torch.float32):
        yield f"dyᵀ x in {dtype}", dy, x, dtype


def _uneven(count: int, width: int, generator: torch.Generator, *, height: int = 1) -> torch.Tensor:
    """Random values, those of each block (`height` rows by 16) of a size of their own: few scales are alike."""
    device = generator.device
    values = torch.randn(count, width, generator=generator, device=device)
    sizes = torch.rand(count // height, width // BLOCK, generator=generator, device=device) * 4 - 2
    return values * sizes.exp2().repeat_interleave(height, 0).repeat_interleave(BLOCK, 1)


def _excess(found: torch.Tensor, a: Operand, b: Operand, dtype: torch.dtype) -> float:
    """The part of the values that are off by more than adding up and rounding explain."""
    expected = exact(a, b, torch.float32)
    magnitude = a.unscaled().abs() @ b.unscaled().abs().T * (a.scale * b.scale)
    bound = TOLERANCE * magnitude + (BFLOAT16 * expected.abs() if dtype == torch.bfloat16 else 0.0)
    return float(((found - expected).abs() <= bound).logical_not().double().mean())
