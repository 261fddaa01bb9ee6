"""LoRA on CPUs by plain matrix products.

vLLM's CPU path serves many adapters at once: it copies the adapter's matrices for every token of a batch. A replica of
ours serves one adapter, on every token, so two products for a layer do.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class DenseLoraWrapper(PunicaWrapperCPU):  # type: ignore[misc]
    """Applies the adapter in slot 0 to all tokens. With more slots than one it is vLLM's own wrapper."""

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """y[:, slice i] += scale · x Aᵢᵀ Bᵢᵀ.

        x: [tokens, inputs]; Aᵢ: [1, 1, rank, inputs]; Bᵢ: [1, 1, outputs, rank].
        """
        if lora_a_stacked[0].shape[0] != 1 or buffer is not None:
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, **kwargs)
            return
        out, tokens = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        begin = 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            out[:, begin : begin + size].addmm_(tokens @ a[0, 0].t(), b[0, 0].t(), alpha=scale)
            begin += size

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """y += scale · x Aᵀ Bᵀ for the output head. y: [tokens, vocabulary]; x: [tokens, hidden]."""
        if lora_a_stacked.shape[0] != 1 or buffer is not None:
            super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, buffer=buffer, **kwargs)
            return
        out, hidden, b = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), lora_b_stacked[0, 0]
        size = min(out.shape[1], b.shape[0])  # the two may be padded differently
        out[:, :size].addmm_((hidden @ lora_a_stacked[0, 0].t()).to(out.dtype), b[:size].t().to(out.dtype), alpha=scale)
