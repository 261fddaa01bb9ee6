"""The optimisers that `optimizer` names, and the form in which their state goes into a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from surogate.config.train import TrainConfig
from trainer_svc.worker.bitsandbytes_library import load_bitsandbytes
from trainer_svc.worker.normuon import NorMuon

SMALLEST_8BIT = 4096
"""Weights with fewer elements keep their moments in float32: they are the sensitive ones, and cost nothing."""

_CODES = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""bitsandbytes' tables of the 8-bit values, which are the same for all weights and belong in no checkpoint."""

Weights = Mapping[str, torch.nn.Parameter]


def make_optimizers(weights: Weights, train: TrainConfig, apart: frozenset[str]) -> list[torch.optim.Optimizer]:
    """One or two optimisers that share the weights. `apart`: names of embeddings and heads.

    Weight decay acts on weights of two dimensions or more.
    """
    if train.optimizer == "adamw_8bit":
        large = {name: weight for name, weight in weights.items() if weight.numel() >= SMALLEST_8BIT}
        made = [_adamw(_without(weights, large), train)]
        return [*made, _adamw_8bit(large, train)] if large else made
    if train.optimizer == "normuon":
        matrices = {name: weight for name, weight in weights.items() if weight.dim() >= 2 and name not in apart}
        made = [_adamw(_without(weights, matrices), train)]
        return [*made, _normuon(matrices, train)] if matrices else made
    return [_adamw(weights, train)]


def saved(state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """One weight's state as tensors of its own."""
    for field, value in state.items():
        if field not in _CODES:
            yield field, value.detach().clone() if isinstance(value, torch.Tensor) else torch.tensor(value)


def restored(optimizer: Any, weight: torch.Tensor, fields: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The inverse of `saved`."""
    state: dict[str, Any] = {
        field: value.clone() if field == "step" else value.to(weight.device).clone() for field, value in fields.items()
    }
    if hasattr(optimizer, "name2qmap"):
        state["step"] = int(state["step"])
        state |= {field: optimizer.name2qmap[code].to(weight.device) for field, code in _CODES.items()}
    return state


def _adamw(weights: Weights, train: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        _by_decay(weights, train),
        lr=train.learning_rate,
        betas=(train.adamw_beta1, train.adamw_beta2),
        eps=train.adamw_epsilon,
        foreach=True,
    )


def _adamw_8bit(weights: Weights, train: TrainConfig) -> torch.optim.Optimizer:
    library = load_bitsandbytes("optimizer")
    made: torch.optim.Optimizer = library.optim.AdamW8bit(
        _by_decay(weights, train),
        lr=train.learning_rate,
        betas=(train.adamw_beta1, train.adamw_beta2),
        eps=train.adamw_epsilon,
        min_8bit_size=SMALLEST_8BIT,
    )
    return made


def _normuon(weights: Weights, train: TrainConfig) -> torch.optim.Optimizer:
    return NorMuon(
        list(weights.values()),
        lr=train.learning_rate,
        momentum=train.normuon_momentum,
        beta2=train.normuon_beta2,
        weight_decay=train.weight_decay,
        cautious=train.normuon_cautious_wd,
    )


def _by_decay(weights: Weights, train: TrainConfig) -> list[dict[str, Any]]:
    return [
        {"params": [weight for weight in weights.values() if weight.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [weight for weight in weights.values() if weight.dim() < 2], "weight_decay": 0.0},
    ]


def _without(weights: Weights, others: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if name not in others}
