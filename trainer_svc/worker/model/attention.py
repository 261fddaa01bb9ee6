"""Attention inside each document of a packed sequence, exactly: the one place that knows how.

Documents lie one after the other in one row of T tokens. Short ones of about the same length are gathered into a batch,
padded on the right: under a causal mask no token sees what is to its right, so that padding changes nothing; long ones
are taken one by one, where they lie. Neither a mask of [T, T] nor one of the documents is ever made. On CUDA, in half
precision, all documents go to the kernel of variable-length attention as they lie. Registered with transformers as
`surogate_packed`; models hand the keyword argument `documents` of their forward through to it.

Legend: T tokens of the row, H query heads, K key-value heads, D head dimensions, n documents of a bucket, L its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from surogate.errors import InvalidInputError

NAME = "surogate_packed"
"""Name of the attention implementation in transformers."""

LARGEST_PADDING = 0.25
"""A document joins a bucket when at most this part of its row would be padding ..."""

SMALL_PADDING = 8
"""... or when the padding is at most this many tokens."""


LONG = 64
"""Documents that are as long as this on average are not gathered: moving them costs more than a batch of them saves."""


@dataclass(frozen=True)
class Bucket:
    """Documents that attention handles as one batch: `count` rows of `length` tokens, the shorter ones padded."""

    count: int
    length: int


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed row are.

    `slots[S]`: the token (0..T-1) that fills each slot of the buckets laid end to end; a padding slot repeats its
    document's last token. `tokens[T]`: the slot of each token. `filled[S, 1, 1]`: 0 for padding slots, else 1; None
    when there is none. `slots` and `tokens` are None when the order of the slots is that of the tokens.

    `offsets[n + 1]`, int32: where each document begins, and where the last one ends; after it come empty ones, so that
    few different sizes occur. `longest`: no document is longer; a power of two, for the same reason.
    """

    buckets: tuple[Bucket, ...]
    slots: torch.Tensor | None
    tokens: torch.Tensor | None
    filled: torch.Tensor | None
    offsets: torch.Tensor
    longest: int

    @property
    def even(self) -> bool:
        """Whether all documents are of one length."""
        return self.slots is None and len(self.buckets) == 1

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Documents:
        """Plans the buckets for documents of these lengths (each >= 1), in the order in which they lie in the row."""
        ends = np.cumsum(lengths)
        offsets = np.full(_power_of_two(len(lengths), least=8) + 1, ends[-1], dtype=np.int32)
        offsets[0], offsets[1 : len(lengths) + 1] = 0, ends
        laid = torch.from_numpy(offsets), _power_of_two(max(lengths), least=128)
        if len(set(lengths)) == 1 or ends[-1] >= LONG * len(lengths):
            runs = tuple(Bucket(len(list(run)), length) for length, run in groupby(lengths))
            return cls(runs, None, None, None, *laid)
        starts = np.concatenate([[0], ends[:-1]])
        order = sorted(range(len(lengths)), key=lambda document: (-lengths[document], document))
        buckets, slots = [], []
        for group in _group_by_length(order, lengths):
            length = lengths[group[0]]
            inside = np.arange(length)[None, :]
            own = np.array([lengths[document] for document in group])[:, None]
            slots.append((starts[group][:, None] + np.minimum(inside, own - 1)).reshape(-1))
            buckets.append(Bucket(len(group), length))
        slot_token = np.concatenate(slots)
        first = np.ones(len(slot_token), dtype=bool)
        first[1:] = slot_token[1:] != slot_token[:-1]
        token_slot = np.empty(int(sum(lengths)), dtype=np.int64)
        token_slot[slot_token[first]] = np.flatnonzero(first)
        filled = None if first.all() else torch.from_numpy(first.astype(np.float32)).view(-1, 1, 1)
        return cls(tuple(buckets), torch.from_numpy(slot_token), torch.from_numpy(token_slot), filled, *laid)

    def to(self, device: torch.device) -> Documents:
        """The same on another device."""
        slots, tokens, filled = (
            None if part is None else on_device(part, device) for part in (self.slots, self.tokens, self.filled)
        )
        return replace(self, slots=slots, tokens=tokens, filled=filled, offsets=on_device(self.offsets, device))


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on another device, made while the host goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _power_of_two(number: int, *, least: int) -> int:
    """The smallest power of two that is no smaller than either."""
    return max(least, 1 << (number - 1).bit_length())


def _group_by_length(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Cuts documents, longest first, into runs in which little is lost to padding."""
    groups: list[list[int]] = []
    for document in order:
        longest = lengths[groups[-1][0]] if groups else 0
        padding = longest - lengths[document]
        if groups and (padding <= SMALL_PADDING or padding <= LARGEST_PADDING * longest):
            groups[-1].append(document)
        else:
            groups.append([document])
    return groups


class _Rows(torch.autograd.Function):
    """Picks rows by an index whose inverse is known, so that the gradient is a pick as well (and deterministic)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.inverse, ctx.weight = inverse, weight
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        grad = grads[0].index_select(0, ctx.inverse)
        return (grad if ctx.weight is None else grad * ctx.weight.to(grad.dtype)), None, None, None


def _pick(
    x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    picked: torch.Tensor = _Rows.apply(x, index, inverse, weight)  # type: ignore[no-untyped-call]
    return picked


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1, H, T, D], key and value [1, K, T, D] → [1, T, H, D].

    `s_aux[H]` are sinks: scores of a position that every token sees and that has no value (gpt-oss).
    """
    if documents is None:
        documents = Documents.of([query.shape[2]]).to(query.device)
    if fits_kernel(value) and softcap is None and s_aux is None and dropout == 0:
        return _kernel_attention(query, key, value, documents, scaling, sliding_window).unsqueeze(0), None
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    if documents.slots is not None and documents.tokens is not None:
        # A padding slot gets no gradient (nothing attends to it and its own output is dropped), so none is lost here.
        rows = [_pick(x, documents.slots, documents.tokens) for x in rows]
    outputs, sizes = [], [bucket.count * bucket.length for bucket in documents.buckets]
    for bucket, *parts in zip(documents.buckets, *(torch.split(x, sizes) for x in rows), strict=True):
        q, k, v = (x.view(bucket.count, bucket.length, *x.shape[1:]).transpose(1, 2) for x in parts)
        output = _causal_attention(q, k, v, scaling, dropout, sliding_window, softcap, s_aux)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    result = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if documents.slots is not None and documents.tokens is not None:
        result = _pick(result, documents.tokens, documents.slots, documents.filled)
    return result.unsqueeze(0), None


LARGEST_HEAD = 256
"""Most dimensions of a head in the kernel of variable-length attention."""


def fits_kernel(value: torch.Tensor) -> bool:
    """Whether CUDA has kernels for what is computed with value [1, K, T, D]: documents stay where they are."""
    return value.is_cuda and value.dtype in (torch.bfloat16, torch.float16) and value.shape[-1] <= LARGEST_HEAD


def _kernel_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Causal attention of all documents at once: as `packed_attention`, → [T, H, D]."""
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    window = sliding_window or documents.longest
    if documents.even and window >= documents.longest and _cudnn_is_faster(value):
        rows = documents.buckets[0].count, documents.buckets[0].length
        q, k, v = (x.view(*rows, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        dense: torch.Tensor = cudnn(q, k, v, None, torch.is_grad_enabled(), 0.0, True, False, scale=scaling)[0]
        return dense.transpose(1, 2).flatten(0, 1)
    offsets, longest = documents.offsets, documents.longest
    sides = {} if window >= longest else {"window_size_left": window - 1, "window_size_right": 0}
    flash = torch.ops.aten._flash_attention_forward
    found = flash(q, k, v, offsets, offsets, longest, longest, 0.0, True, False, scale=scaling, **sides)
    packed: torch.Tensor = found[0]
    return packed


def _cudnn_is_faster(value: torch.Tensor) -> bool:
    """On Hopper cuDNN's kernel, which takes documents of one length, is 1.5 times as fast as the other."""
    return torch.cuda.get_device_capability(value.device) == (9, 0) and value.shape[-1] in (64, 128)


def _causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of n sequences: q [n, H, L, D], k and v [n, K, L, D], sinks [H] → [n, H, L, D].

    With a soft cap or sinks the scores [n, H, L, L] of one batch are made.
    """
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    window = sliding_window or length
    plain = softcap is None and sinks is None
    if plain and window >= length:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=groups > 1
        )
    position = torch.arange(length, device=q.device)
    distance = position[:, None] - position[None, :]
    seen = (distance >= 0) & (distance < window)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, scale=scaling)
    scores = q @ k.transpose(-1, -2) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float().masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1)[..., :length].to(v.dtype)
    return F.dropout(weights, dropout) @ v


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switches a model to this attention. Raises InvalidInputError for an architecture that cannot be."""
    if not getattr(model, "_supports_attention_backend", False):
        raise InvalidInputError(
            f"the architecture {type(model).__name__} does not let its attention be chosen, so that documents could "
            "not be kept apart; choose a model whose transformers implementation supports attention backends"
        )
    AttentionInterface.register(NAME, packed_attention)
    model.set_attn_implementation(NAME)
