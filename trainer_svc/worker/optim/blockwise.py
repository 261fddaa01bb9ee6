"""bitsandbytes' AdamW with moments of 8 bits, over weights that are cut over ranks by rows (FSDP2).

Moments have a scale for each block of 256, in the order of the whole weight. Where every rank's rows begin with a
block, which is so in models of common sizes, a rank updates its own rows and keeps their moments. Where they do not,
each rank makes the step of the whole weight and keeps its rows of the result; the moments of that weight are then on
every rank. Either way a step is, to the bit, the one that one process makes with the same gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from trainer_svc.worker.shares import own, own_rows, whole

BLOCK = 256
"""Elements that share a scale in bitsandbytes."""

_SCALES = ("absmax1", "absmax2")
_MOMENTS = ("state1", "state2")


def over_shares(kind: type[Any]) -> type[Any]:
    """bitsandbytes' optimiser `kind`, made to step on shares."""
    return type(f"{kind.__name__}OverShares", (OverShares, kind), {})


class OverShares:
    """What differs from bitsandbytes' own class: it is shown plain tensors in place of the weights."""

    state: Any

    def init_state(self, group: Any, weight: DTensor, group_index: int, index: int) -> None:
        """Moments of zero."""
        seen = _seen(weight)
        super().init_state(group, seen, group_index, index)  # type: ignore[misc]
        self.state[weight] = self.state.pop(seen)

    def update_step(self, group: Any, weight: DTensor, group_index: int, index: int) -> None:
        """One step of one weight."""
        state, seen = self.state[weight], _seen(weight)
        if seen.numel() == 0:  # fewer rows than ranks
            state["step"] += 1
            return
        assert weight.grad is not None
        seen.grad = own(weight.grad) if begins_with_blocks(weight) else whole(weight.grad)
        self.state[seen] = state
        super().update_step(group, seen, group_index, index)  # type: ignore[misc]
        del self.state[seen]
        if not begins_with_blocks(weight):
            own(weight).copy_(seen[own_rows(weight)])


def begins_with_blocks(weight: DTensor) -> bool:
    """Whether every rank's rows begin with a block."""
    most = -(-weight.shape[0] // weight.device_mesh.size())
    return most * weight.shape[1:].numel() % BLOCK == 0


def joined(everybodys: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The state of the whole weight, of all ranks' states of their shares."""
    return {
        field: torch.cat([state[field] for state in everybodys]) if field in (*_MOMENTS, *_SCALES) else value
        for field, value in everybodys[0].items()
    }


def share_of(field: str, value: torch.Tensor, weight: DTensor) -> torch.Tensor:
    """What this rank keeps of a field of the whole weight's state."""
    if not begins_with_blocks(weight):
        return value
    rows, width = own_rows(weight), weight.shape[1:].numel()
    if field in _MOMENTS:
        return value[rows]
    return value[rows.start * width // BLOCK : -(-rows.stop * width // BLOCK)] if field in _SCALES else value


def _seen(weight: DTensor) -> torch.Tensor:
    """What bitsandbytes updates: the rank's rows themselves, or a copy of the whole weight."""
    return (own(weight) if begins_with_blocks(weight) else whole(weight)).detach()
