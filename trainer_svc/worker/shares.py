"""Tensors that are cut over ranks by rows, as FSDP2 cuts weights: a rank's part of one, and one of all parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

Work = Callable[[torch.Tensor], torch.Tensor]


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor in one piece. All ranks must ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def collects() -> bool:
    """Whether this rank keeps what is gathered: rank 0, which alone writes files. So does a single process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def collected(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensors in one piece on rank 0, tied ones the same object; nothing on others.

    All ranks must ask for them. They come one after the other, so that a rank which drops them never holds two. What
    was in shares is in host memory, floats in `dtype` if given: the device need not have room for all of it.
    """
    found: dict[int, torch.Tensor] = {}
    for key, value in {id(value): value for value in tensors.values()}.items():  # every rank gathers tied ones once
        one = whole(value.detach())
        if collects():
            found[key] = _on_host(one, dtype) if isinstance(value, DTensor) else one
        del one
    return {name: found[id(value)] for name, value in tensors.items()} if collects() else {}


def whole_state(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """`module.state_dict()` as `collected` gives it."""
    return collected(module.state_dict(keep_vars=True), dtype)


def _on_host(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return (value.to(dtype) if dtype is not None and value.is_floating_point() else value).cpu()


def own(value: torch.Tensor) -> torch.Tensor:
    """This rank's rows, which are written to in place; of a tensor in one piece, the tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def own_rows(value: DTensor) -> slice:
    """Which rows of the whole they are."""
    return _rows(value, value.device_mesh.get_local_rank())


def share_like(value: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """This rank's share of a whole tensor that all ranks have, cut as `example` is; on its device."""
    value = value.to(example.device)
    if not isinstance(example, DTensor):
        return value
    return distribute_tensor(value, example.device_mesh, example.placements, src_data_rank=None)


def by_owners(shares: Sequence[DTensor], work: Work) -> list[torch.Tensor]:
    """Has rank i do `work` on the i-th tensor, in one piece; returns this rank's rows of each result.

    There are no more tensors than ranks, of one format, and results are shaped like them. All ranks must take part.
    """
    mesh = shares[0].device_mesh
    rank, group = mesh.get_local_rank(), mesh.get_group()
    parts = [share.to_local() for share in shares]
    given = [part.numel() for part in parts] + [0] * (mesh.size() - len(parts))
    mine = shares[rank] if rank < len(shares) else None
    taken = [0 if mine is None else _elements(mine, other) for other in range(mesh.size())]
    sent = torch.cat([part.reshape(-1) for part in parts])
    received = sent.new_empty(sum(taken))
    dist.all_to_all_single(received, sent, taken, given, group=group)
    done = received if mine is None else work(received.view(mine.shape)).contiguous().view(-1)
    dist.all_to_all_single(sent, done, given, taken, group=group)
    back = torch.split(sent, given[: len(parts)])
    return [found.view_as(part) for found, part in zip(back, parts, strict=True)]


def _rows(value: DTensor, rank: int) -> slice:
    count, most = value.shape[0], -(-value.shape[0] // value.device_mesh.size())
    return slice(min(rank * most, count), min((rank + 1) * most, count))


def _elements(value: DTensor, rank: int) -> int:
    rows = _rows(value, rank)
    return int((rows.stop - rows.start) * value.shape[1:].numel())
