"""Log-probabilities of given next tokens from hidden states, without ever holding the logits of all tokens at once.

A chunk's logits are made, read and dropped. The gradient of the sum of all log-probabilities (a supervised loss) is
known with the logits and is taken on the way, so that they are made once; where it depends on what the loss does with
each token (GRPO), the backward pass makes them again.

Legend: M positions, m those of a chunk, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch.utils.checkpoint import checkpoint

from trainer_svc.worker.logprobs.head_math import coefficients_to_gradient, logprobs_and_gradient, statistics

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Logits held at a time, by kind of device: 32 MiB and 1 GiB of float32; products with fewer of them are slow."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states [m, E] → logits [m, V]."""


def token_logprobs(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    temperature: torch.Tensor | None = None,
    *,
    vocab_size: int,
    chunks: int = 1,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of `targets[M]` after `hidden[M, E]`, in float32, [M]; and the entropy [M] in nats if asked for.

    Logits are divided by `temperature[M]` (> 0; None means 1) first, as a sampler does. The entropy carries no
    gradient. `chunks` is the least number of chunks.
    """
    size = chunk_size(hidden, vocab_size, chunks)
    if is_matrix(head):
        hidden, weight = _operands(hidden, head.weight)
        logprobs, entropy = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden, weight, targets, temperature, size, with_entropy
        )
        return logprobs, entropy if with_entropy else None
    parts = []
    for part in _slices(len(targets), size):
        args = (hidden[part], head, targets[part], None if temperature is None else temperature[part], with_entropy)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_chunk_logprobs, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_chunk_logprobs(*args))
    logprobs = torch.cat([part[0] for part in parts])
    return logprobs, torch.cat([part[1] for part in parts]) if with_entropy else None


def summed_logprob(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, *, vocab_size: int, chunks: int = 1
) -> torch.Tensor:
    """The sum of `token_logprobs` at temperature 1, 0-d, and its gradient, for less than the two of them cost."""
    if not is_matrix(head) or not torch.is_grad_enabled():
        return token_logprobs(hidden, head, targets, vocab_size=vocab_size, chunks=chunks)[0].sum()
    hidden, weight = _operands(hidden, head.weight)
    size = chunk_size(hidden, vocab_size, chunks)
    total: torch.Tensor = _SummedLogprob.apply(hidden, weight, targets, size)  # type: ignore[no-untyped-call]
    return total


def is_matrix(head: Head) -> TypeGuard[torch.nn.Linear]:
    """Whether a head does nothing but multiply by a matrix that is there as such."""
    return type(head) is torch.nn.Linear and head.bias is None


def chunk_size(hidden: torch.Tensor, vocab_size: int, chunks: int) -> int:
    """Positions worked off at a time."""
    limit = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cpu"]) // vocab_size
    size = max(1, min(limit, -(-hidden.shape[0] // chunks)))
    if hidden.is_cuda:  # equal parts, and rows that suit matrix units
        parts = -(-hidden.shape[0] // size)
        size = -(-hidden.shape[0] // parts // 64) * 64 or size
    return size


def logprobs_of(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor | None = None, *, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same from logits [M, V]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature is not None:
        logits = logits / temperature.to(logits.dtype)[:, None]
    logprobs = logits.log_softmax(-1)
    picked = logprobs.gather(-1, targets[:, None]).squeeze(-1)
    if not with_entropy:
        return picked, None
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).nan_to_num_(0.0).sum(-1)
    return picked, entropy


class _TokenLogprobs(torch.autograd.Function):
    """(hidden [M, E], weight [V, E]) → logprobs [M], entropy [M] (zeros unless asked for)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: torch.Tensor | None,
        size: int,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_of = _Logits(hidden, weight, size)
        found = [
            statistics(logits_of(part), targets[part], _part(temperature, part), with_entropy)
            for part in _slices(len(targets), size)
        ]
        logprobs, lse, entropy = (torch.cat([item[place] for item in found]) for place in range(3))
        ctx.save_for_backward(hidden, weight, targets, temperature, lse)
        ctx.size = size
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, temperature, lse = ctx.saved_tensors
        gradient, logits_of = _Gradient(hidden, weight, ctx.needs_input_grad), _Logits(hidden, weight, ctx.size)
        for part in _slices(len(targets), ctx.size):
            logits, warm = logits_of(part), _part(temperature, part)
            gradient.add(part, coefficients_to_gradient(logits, targets[part], warm, lse[part], grads[0][part]))
        return gradient.hidden, gradient.weight, None, None, None, None


class _SummedLogprob(torch.autograd.Function):
    """(hidden [M, E], weight [V, E]) → sum of logprobs, 0-d; the gradient is there before it is asked for."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, size: int) -> torch.Tensor:
        gradient, logits_of = _Gradient(hidden, weight, ctx.needs_input_grad), _Logits(hidden, weight, size)
        sums = []
        for part in _slices(len(targets), size):
            logprobs, logits_gradient = logprobs_and_gradient(logits_of(part), targets[part])
            sums.append(logprobs.sum())
            gradient.add(part, logits_gradient)
        ctx.save_for_backward(gradient.hidden, gradient.weight)
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        return (
            None if hidden is None else hidden.mul_(grads[0].to(hidden.dtype)),
            None if weight is None else weight.mul_(grads[0].to(weight.dtype)),
            None,
            None,
        )


class _Logits:
    """Chunks of logits, all in the same memory: what the one before held is gone with the next.

    On a CPU they lie vocabulary by vocabulary, [V, m]: the products with them take a third less time so.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, size: int) -> None:
        self._states, self._matrix = hidden.detach(), weight.detach()
        self._memory = hidden.new_empty(min(size, len(hidden)) * len(weight))

    def __call__(self, part: slice) -> torch.Tensor:
        """Logits [m, V] of positions `part`."""
        states, (vocab, _) = self._states[part], self._matrix.shape
        memory = self._memory[: len(states) * vocab]
        if states.is_cuda:
            return torch.mm(states, self._matrix.T, out=memory.view(-1, vocab))
        return torch.mm(self._matrix, states.T, out=memory.view(vocab, -1)).T


class _Gradient:
    """Gradients of hidden states and head, as far as they are needed, from those of chunks of logits."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, needed: tuple[bool, ...]) -> None:
        self._states, self._matrix = hidden.detach(), weight.detach()
        self.hidden = torch.empty_like(self._states) if needed[0] else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.weight = torch.zeros_like(self._matrix, dtype=wide) if needed[1] else None

    def add(self, part: slice, logits: torch.Tensor) -> None:
        """Takes the gradient of the logits [m, V] of positions `part`."""
        if self.hidden is not None:
            self.hidden[part] = logits @ self._matrix
        if self.weight is None:
            return
        if self.weight.dtype == logits.dtype:
            self.weight.addmm_(logits.T, self._states[part])
        else:
            self.weight += logits.T @ self._states[part]


def _operands(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the format that a linear layer computes in here: autocast's, inside it, else their own.

    The conversion is autograd's business, and so is that of the gradients back.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return hidden.to(dtype), weight.to(dtype)


def _chunk_logprobs(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, temperature: torch.Tensor | None, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return logprobs_of(head(hidden), targets, temperature, with_entropy=with_entropy)


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _part(temperature: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if temperature is None else temperature[part]
