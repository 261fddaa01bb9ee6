"""A linear layer whose three products, of the forward pass and of both gradients, are computed in NVFP4.

Legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from trainer_svc.worker.nvfp4.operand import BLOCK, Weight, rows
from trainer_svc.worker.nvfp4.product import MULTIPLE, Product


class Nvfp4Linear(torch.nn.Linear):
    """A Linear, so that peft adapts it; weight and bias are those of the layer that it is made of."""

    def __init__(self, layer: torch.nn.Linear, product: Product) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.weight, self.bias = layer.weight, layer.bias
        self._product = product

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in torch's own class
        """x → x Wᵀ + b, in the format that is computed in: autocast's, inside it, else the input's."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        x = input.to(dtype).reshape(-1, self.in_features)
        y: torch.Tensor = _Products.apply(x, self.weight, self._product)  # type: ignore[no-untyped-call]
        y = y.view(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)


class _Products(torch.autograd.Function):
    """x[T, I], W[O, I] → x Wᵀ [T, O].

    All that is drawn at random is drawn in the backward pass: a forward pass that is made again draws nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, product: Product) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.product = product
        return product(rows(x), Weight.of(weight).along_in(), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """dx = dy W; dW = dyᵀ x, both turned along T by the same random Hadamard matrix, which cancels out."""
        x, weight = ctx.saved_tensors
        dy = grads[0]
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            same = Weight.of(weight).along_out()  # the very values of the forward pass
            dx = ctx.product(rows(dy, at_random=True), same, x.dtype)
        if ctx.needs_input_grad[1]:
            turn = random_hadamard(dy.device)
            dweight = ctx.product(rows(turned(dy, turn), at_random=True), rows(turned(x, turn)), weight.dtype)
        return dx, dweight, None


def random_hadamard(device: torch.device) -> torch.Tensor:
    """An orthogonal matrix [16, 16]: Hadamard's, with the signs of its rows at random."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < BLOCK:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (BLOCK, 1), device=device) * 2 - 1
    return (signs * matrix).div(BLOCK**0.5)


def turned(matrix: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """[T, N] → [N, T], T filled up with zeros to a multiple of 32, each 16 of it times `turn`: outliers are spread."""
    filled = F.pad(matrix.T.float(), (0, -len(matrix) % MULTIPLE))
    return torch.matmul(filled.reshape(len(filled), -1, BLOCK), turn).flatten(1)
