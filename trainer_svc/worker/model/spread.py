"""A model over several ranks, by PyTorch's own engines: DDP, or FSDP2. And its weights back in one piece.

`zero_level` 1: every rank has all weights (DDP) and part of the optimiser's state (ZeroRedundancyOptimizer). 2:
weights, gradients and state are in shares, and weights stay whole between a forward and its backward pass (FSDP2).
3: they are whole only while their layer computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from trainer_svc.worker.model.forward import PackedForward


def spread(forward: PackedForward, zero_level: int) -> nn.Module:
    """What to call instead of `forward` in training. Its weights become shares in place at levels 2 and 3."""
    if zero_level == 1:
        return DistributedDataParallel(forward, gradient_as_bucket_view=True, broadcast_buffers=False)
    keep = zero_level == 2
    for layer in decoder_layers(forward.model):
        fully_shard(layer, reshard_after_forward=not keep)
    fully_shard(forward, reshard_after_forward=False)
    return forward


def last_of_step(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """The context of a micro-batch's passes: DDP adds gradients up over ranks in the last one of a step alone."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor in one piece. All ranks must ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def share_like(value: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """This rank's share of a whole tensor that all ranks have, cut as `example` is; on its device."""
    value = value.to(example.device)
    if not isinstance(example, DTensor):
        return value
    return distribute_tensor(value, example.device_mesh, example.placements, src_data_rank=None)


def whole_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """`module.state_dict()` with every tensor in one piece, tied ones the same object. All ranks must ask for it."""
    found: dict[int, torch.Tensor] = {}
    state: Mapping[str, torch.Tensor] = module.state_dict(keep_vars=True)
    return {name: found.setdefault(id(value), whole(value.detach())) for name, value in state.items()}


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the items of the longest list of equal modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])
