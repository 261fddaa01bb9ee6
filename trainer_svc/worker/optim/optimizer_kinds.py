"""The optimisers that `optimizer` names, and the form in which their state goes into a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from surogate.config.train import TrainConfig
from trainer_svc.worker.optim.blockwise import OverShares, over_shares, share_of
from trainer_svc.worker.optim.normuon import NorMuon
from trainer_svc.worker.quantized.bitsandbytes_library import load_bitsandbytes
from trainer_svc.worker.shares import share_like

SMALLEST_8BIT = 4096
"""Weights with fewer elements keep their moments in float32: they are the sensitive ones, and cost nothing."""

_CODES = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""bitsandbytes' tables of the 8-bit values, which are the same for all weights and belong in no checkpoint."""

Weights = Mapping[str, torch.nn.Parameter]


def make_optimizers(
    weights: Weights, train: TrainConfig, apart: frozenset[str], *, zero: bool = False
) -> list[torch.optim.Optimizer]:
    """One or two optimisers that share the weights. `apart`: names of embeddings and heads.

    Weight decay acts on matrices alone. With `zero` a rank keeps the state of part of the weights.
    """
    shares = [(_adamw, weights)]
    if train.optimizer == "adamw_8bit":
        large = {name: weight for name, weight in weights.items() if weight.numel() >= SMALLEST_8BIT}
        shares = [(_adamw, _without(weights, large)), (_adamw_8bit, large)]
    if train.optimizer == "normuon":
        matrices = {name: weight for name, weight in weights.items() if is_matrix(name, weight) and name not in apart}
        shares = [(_adamw, _without(weights, matrices)), (_normuon, matrices)]
    return [make(share, train, zero) for make, share in shares if share]


def is_matrix(name: str, weight: torch.Tensor) -> bool:
    """Whether a weight is a matrix, or a stack of them; the biases of a mixture's experts are a stack of vectors."""
    return weight.dim() >= 2 and not name.endswith("bias")


def takes_scale(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GPU may decide by itself on clipping a step, or on not making it."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    plain = all(weight.is_cuda and not isinstance(weight, DTensor) for weight in weights)
    return isinstance(optimizer, torch.optim.AdamW) and fused and plain


def local(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser of this rank's part of the weights."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def saved(state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """One weight's state as tensors of its own."""
    for field, value in state.items():
        if field not in _CODES:
            yield field, value.detach().clone() if isinstance(value, torch.Tensor) else torch.tensor(value)


def restored(optimizer: Any, weight: torch.Tensor, fields: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The inverse of `saved`."""
    state: dict[str, Any] = {}
    for field, value in fields.items():
        if isinstance(optimizer, OverShares):
            state[field] = share_of(field, value, weight).to(weight.device).clone()  # type: ignore[arg-type]
        else:
            state[field] = value.clone() if field == "step" else _like(value, weight)
    if hasattr(optimizer, "name2qmap"):
        state["step"] = int(state["step"])
        state |= {field: optimizer.name2qmap[code].to(weight.device) for field, code in _CODES.items()}
    return state


def _like(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A copy on the weight's device; of what has its rows, where they are cut over ranks, this rank's share."""
    has_rows = value.shape in (weight.shape, weight.shape[:-1])
    return share_like(value, weight).clone() if has_rows else value.to(weight.device).clone()


def _adamw(weights: Weights, train: TrainConfig, zero: bool) -> torch.optim.Optimizer:
    return _made(
        torch.optim.AdamW,
        zero,
        _by_decay(weights, train),
        lr=train.learning_rate,
        betas=(train.adamw_beta1, train.adamw_beta2),
        eps=train.adamw_epsilon,
        fused=True,
    )


def _adamw_8bit(weights: Weights, train: TrainConfig, zero: bool) -> torch.optim.Optimizer:
    kind = load_bitsandbytes("optimizer").optim.AdamW8bit
    in_shares = any(isinstance(weight, DTensor) for weight in weights.values())
    return _made(
        over_shares(kind) if in_shares else kind,
        zero,
        _by_decay(weights, train),
        lr=train.learning_rate,
        betas=(train.adamw_beta1, train.adamw_beta2),
        eps=train.adamw_epsilon,
        min_8bit_size=0,  # `weights` are those that are large enough; a share may be smaller
    )


def _normuon(weights: Weights, train: TrainConfig, zero: bool) -> torch.optim.Optimizer:
    return _made(
        NorMuon,
        zero,
        list(weights.values()),
        lr=train.learning_rate,
        momentum=train.normuon_momentum,
        beta2=train.normuon_beta2,
        weight_decay=train.weight_decay,
        cautious=train.normuon_cautious_wd,
    )


def _made(kind: Any, zero: bool, weights: list[Any], **options: Any) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = (
        ZeroRedundancyOptimizer(weights, kind, **options) if zero else kind(weights, **options)
    )
    return made


def _by_decay(weights: Weights, train: TrainConfig) -> list[dict[str, Any]]:
    matrices = [weight for name, weight in weights.items() if is_matrix(name, weight)]
    vectors = [weight for name, weight in weights.items() if not is_matrix(name, weight)]
    groups = ({"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _without(weights: Weights, others: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if name not in others}
