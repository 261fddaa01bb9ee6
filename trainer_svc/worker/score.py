"""Logprobs of given tokens under the current weights: what a canary compares with a replica's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from surogate.errors import InvalidInputError
from trainer_svc.worker.data.packing import pack
from trainer_svc.worker.model.batch import Document, collate
from trainer_svc.worker.model.policy import Policy


@torch.no_grad()
def score(policy: Policy, sequences: Sequence[Sequence[int]], temperature: float, capacity: int) -> list[list[float]]:
    """Log-probability of every token but the first of each sequence, logits divided by `temperature` > 0.

    Raises InvalidInputError for sequences that are too short or have ids that the model does not know.
    """
    if not temperature > 0:
        raise InvalidInputError(f"temperature must be greater than 0, got {temperature}")
    documents = [_document(ids, index, policy.vocab_size) for index, ids in enumerate(sequences)]
    lengths = [len(document) for document in documents]
    results: list[list[float]] = [[] for _ in documents]
    policy.train(False)
    for row in pack(lengths, max(capacity, *lengths)):
        batch = collate([documents[index] for index in row])
        warm = None if temperature == 1 else torch.full((len(batch.targets),), temperature, device=policy.device)
        logprobs = policy.logprobs(batch, warm)[0].cpu()
        for place, index in enumerate(row):
            results[index] = logprobs[batch.owner == place].tolist()
    policy.train(True)
    return results


def _document(ids: Sequence[int], index: int, vocab_size: int) -> Document:
    tokens = np.array(ids, dtype=np.int64)
    if len(tokens) < 2:
        raise InvalidInputError(f"sequences[{index}] has {len(tokens)} tokens; at least 2 are needed")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise InvalidInputError(f"sequences[{index}] has ids outside 0 to {vocab_size - 1}")
    return Document(tokens, np.ones(len(tokens), dtype=np.bool_))
