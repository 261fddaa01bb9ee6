"""A model over several ranks, by PyTorch's own engines: DDP, or FSDP2.

`zero_level` 1: every rank has all weights (DDP) and part of the optimiser's state (ZeroRedundancyOptimizer). 2:
trained weights, gradients and state are in shares, and weights stay whole between a forward and its backward pass
(FSDP2); frozen weights, which have neither gradients nor state, are on every rank. 3: all weights are in shares, and
whole only while their layer computes.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trainer_svc.worker.model.forward import PackedForward
from trainer_svc.worker.quantized.linear import QuantizedLinear


def spread(forward: PackedForward, zero_level: int) -> nn.Module:
    """What to call instead of `forward` in training. Its weights become shares in place at levels 2 and 3."""
    if zero_level == 1:
        return DistributedDataParallel(forward, gradient_as_bucket_view=True, broadcast_buffers=False)
    keep = zero_level == 2
    if not keep:
        for layer in forward.model.modules():
            if isinstance(layer, QuantizedLinear):
                layer.scales_as_weights()
    left_whole = {weight for weight in forward.parameters() if keep and not weight.requires_grad}
    for layer in decoder_layers(forward.model):
        fully_shard(layer, reshard_after_forward=not keep, ignored_params=left_whole)
    fully_shard(forward, reshard_after_forward=False, ignored_params=left_whole)
    return forward


def last_of_step(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """The context of a micro-batch's passes: DDP adds gradients up over ranks in the last one of a step alone."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the items of the longest list of equal modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])
