"""The log-probabilities of targets and the gradient of their sum, in one kernel for CUDA: logits are read once.

Legend: m positions, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 8192


def logprobs_and_gradient_(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [m, V], contiguous → logprobs [m], float32, and the logits' own memory with the gradient in it.

    A negative target stands for no token: its logprob is 0 and has no gradient.
    """
    logprobs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _kernel[(len(logits),)](logits, targets, logprobs, logits.shape[1], logits.stride(0), _BLOCK, num_warps=16)
    return logprobs, logits


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(logits, targets, logprobs, vocab, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """A row: its largest value and sum of exponentials first, then p minus one at the target, negated, in place."""
    row = tl.program_id(0).to(tl.int64)
    values = logits + row * stride
    target = tl.load(targets + row)
    inside = tl.arange(0, BLOCK)
    if target < 0:
        for start in range(0, vocab, BLOCK):
            place = start + inside
            tl.store(values + place, 0.0, mask=place < vocab)
        tl.store(logprobs + row, 0.0)
    else:
        largest = tl.full((), -float("inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        for start in range(0, vocab, BLOCK):
            place = start + inside
            x = tl.load(values + place, mask=place < vocab, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(largest, tl.max(x, 0))
            total = total * tl.exp(largest - higher) + tl.sum(tl.exp(x - higher), 0)
            largest = higher
        normaliser = largest + tl.log(total)
        tl.store(logprobs + row, tl.load(values + target).to(tl.float32) - normaliser)
        tl.debug_barrier()  # the target's value is read before any is overwritten
        for start in range(0, vocab, BLOCK):
            place = start + inside
            x = tl.load(values + place, mask=place < vocab, other=0.0).to(tl.float32)
            gradient = tl.where(place == target, 1.0, 0.0) - tl.exp(x - normaliser)
            tl.store(values + place, gradient.to(logits.dtype.element_ty), mask=place < vocab)
