"""Log-probabilities of given next tokens from hidden states, without ever holding the logits of all tokens at once.

Legend: M positions, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 24
"""Logits held at a time, 64 MiB in float32. More are worked off in chunks, each computed again for its gradient."""

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
    count = targets.shape[0]
    chunk = max(1, min(CHUNK_ELEMENTS // vocab_size, -(-count // chunks)))
    if count <= chunk:
        return _chunk_logprobs(hidden, head, targets, temperature, with_entropy)
    parts = []
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        warmth = None if temperature is None else temperature[part]
        args = (hidden[part], head, targets[part], warmth, with_entropy)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_chunk_logprobs, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_chunk_logprobs(*args))
    logprobs = torch.cat([part[0] for part in parts])
    return logprobs, torch.cat([part[1] for part in parts]) if with_entropy else None


def _chunk_logprobs(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, temperature: torch.Tensor | None, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return logprobs_of(head(hidden), targets, temperature, with_entropy=with_entropy)


def logprobs_of(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor | None = None, *, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same from logits [M, V]."""
    logits = logits.float()
    if temperature is not None:
        logits = logits / temperature.float()[:, None]
    logprobs = logits.log_softmax(-1)
    picked = logprobs.gather(-1, targets[:, None]).squeeze(-1)
    if not with_entropy:
        return picked, None
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).nan_to_num_(0.0).sum(-1)
    return picked, entropy
