"""LoRA layers that read the same input, computed together: query, key and value; gate and up; others by themselves.

An adapter's products are so thin that a card spends its time on starting them and on moving what they read and write.
Of a group the base weights lie in one matrix, and so do the adapters' A; their B are the blocks of a diagonal. What an
adapter adds is added by its product, in place; to gate and up on the way to silu(gate)·up. With dropout each adapter
reads what its own draw keeps of the input. The numbers are those of PEFT's layers.

Legend: T tokens, E input features, F output features of the group, r rank, n members, R = n·r.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.nn import functional as F

from trainer_svc.worker.adapters import gated  # noqa: F401 - its operations are called by their names
from trainer_svc.worker.adapters.lora_dropout import MOST_LAYERS, draw_for, dropped

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that read the same input, in the order in which they are called."""

ADAPTER = "default"

torch.library.define("surogate::add_product_", "(Tensor(a!) y, Tensor left, Tensor right) -> ()")


@torch.library.impl("surogate::add_product_", "CompositeExplicitAutograd")
def _add_product(y: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """y [m, n] += left [m, k] · right [k, n]. A compiler would add a product to a copy."""
    y.addmm_(left, right)


@torch.library.register_fake("surogate::add_product_")  # type: ignore[untyped-decorator]
def _add_product_of_shapes(y: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    del y, left, right


class AdapterGroups:
    """All groups of a model, and their adapters in the format of its weights."""

    def __init__(self, groups: Sequence[_Group]) -> None:
        self._parts: dict[tuple[float, bool], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for place, weight, scaling in (found for group in groups for found in group.places()):
            # Places that lie apart are copied to one by one, and would hold up the others.
            places, weights = self._parts.setdefault((scaling, place.is_contiguous()), ([], []))
            places.append(place)
            weights.append(weight)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the adapters' weights over as they are now. To be called when they may have changed."""
        for (scaling, _), (places, weights) in self._parts.items():
            torch._foreach_copy_(places, weights if scaling == 1 else torch._foreach_mul(weights, scaling))


def group_adapters(model: torch.nn.Module) -> AdapterGroups | None:
    """Has the LoRA layers of `model` compute in groups; None where there is none that can.

    Base weights are moved, not changed. Layers may be called by others or alone: they compute what they did.
    """
    groups = []
    for parent in model.modules():
        children = {name: layer for name, layer in parent.named_children() if _is_plain(layer)}
        shared = [[children[n] for n in names] for names in SHARED if all(n in children for n in names)]
        shared = [members for members in shared if _fit(members)]
        taken = {id(layer) for members in shared for layer in members}
        groups += [_Group(members) for members in (*shared, *([c] for c in children.values() if id(c) not in taken))]
    _gate(model)
    return AdapterGroups(groups) if groups else None


def _gate(model: torch.nn.Module) -> None:
    """Has feed-forward layers of gate and up computed in one pass where they are silu(gate)·up: each is asked, once."""
    for layer in model.modules():
        gate, up, down = (getattr(layer, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
        if not isinstance(gate, _GroupedLinear) or not isinstance(up, _GroupedLinear) or down is None:
            continue
        if gate.group is not up.group or len(set(gate.group.sizes)) != 1 or gate.group.bias is not None:
            continue
        made, weight = _GatedFeedForward(layer, gate, down), gate.group.weight
        probe = torch.linspace(-2, 2, 8 * weight.shape[1], device=weight.device, dtype=torch.float32)
        probe = probe.view(-1, 8).T.unsqueeze(0).to(weight.dtype)
        with torch.no_grad(), _without_dropout(layer):
            expected, found = layer(probe).float(), made(probe).float()
        if (found - expected).norm() <= 0.02 * expected.norm():
            layer.forward = made


@contextlib.contextmanager
def _without_dropout(layer: torch.nn.Module) -> Iterator[None]:
    was_training = layer.training
    layer.eval()
    yield
    layer.train(was_training)


class _GatedFeedForward:
    """What takes the place of a feed-forward layer's forward."""

    def __init__(self, layer: torch.nn.Module, gate: Any, down: Any) -> None:
        self._plain = layer.forward
        self._gate, self._down = gate, down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._gate.disable_adapters:
            plain: torch.Tensor = self._plain(x)
            return plain
        result: torch.Tensor = self._down(self._gate.group.gated(x))
        return result


class _GroupedLinear(LoraLinear):  # type: ignore[misc]
    """PEFT's layer as a member of a group."""

    group: _Group
    index: int

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters:
            base: torch.Tensor = self.base_layer(x, *args, **kwargs)
            return base
        return self.group.output(self.index, x)


class _Group:
    """n layers. `weight[F, E]`; `a[R, E]`, times the adapters' scaling; `b[F, R]`, zero beside the diagonal."""

    def __init__(self, members: Sequence[Any]) -> None:
        self._layers = tuple(members)
        bases = [layer.base_layer for layer in members]
        self.sizes = [base.out_features for base in bases]
        rank, scaling = members[0].r[ADAPTER], float(members[0].scaling[ADAPTER])
        self.weight = torch.cat([base.weight.data for base in bases])
        self.bias = None if bases[0].bias is None else torch.cat([base.bias.data for base in bases])
        self.a = self.weight.new_zeros(len(bases) * rank, bases[0].in_features)
        self.b = self.weight.new_zeros(sum(self.sizes), len(bases) * rank)
        for base, part in zip(bases, torch.split(self.weight, self.sizes), strict=True):
            base.weight.data = part
        self._plan = _Plan(scaling, tuple(self.sizes), rank, _rate(members[0]))
        self.adapters = tuple(
            w for layer in members for w in (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        )
        self.waiting: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None
        for index, layer in enumerate(members):
            layer.__class__, layer.group, layer.index = _GroupedLinear, self, index

    def places(self) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """Where each adapter's weight goes, the weight, and what it is multiplied by."""
        found = []
        for index, (rows, columns) in enumerate(self._plan.parts):
            # .data: what a backward pass kept of them is not out of date when the same is written again.
            found.append((self.a.data[columns], self.adapters[2 * index], self._plan.scaling))
            found.append((self.b.data[rows, columns], self.adapters[2 * index + 1], 1.0))
        return found

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What member `index` makes of x [..., E]; the first makes all that the others are asked for next."""
        waiting = self.waiting
        if index == 0 or waiting is None or waiting[0] is not x:
            waiting = (x, self._outputs(x))
        self.waiting = waiting if index + 1 < len(self.sizes) else None
        return waiting[1][index]

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate)·up of a group of these two, for x [..., E]."""
        flat = x.to(self.weight.dtype).reshape(-1, x.shape[-1])
        found = _GatedProducts.apply(  # type: ignore[no-untyped-call]
            flat, self.weight, self.a, self.b, self._dropout(flat), self._plan, *self.adapters
        )
        result: torch.Tensor = found.view(*x.shape[:-1], found.shape[-1])
        return result

    def _outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat = x.to(self.weight.dtype).reshape(-1, x.shape[-1])
        found = _Products.apply(  # type: ignore[no-untyped-call]
            flat, self.weight, self.bias, self.a, self.b, self._dropout(flat), self._plan, *self.adapters
        )
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in found)

    def _dropout(self, x: torch.Tensor) -> torch.Tensor | None:
        """What the members' adapters keep of x [T, E], drawn anew; None where they keep everything."""
        active = self._plan.rate > 0 and self._layers[0].training
        return draw_for(len(self.sizes), x, self._plan.rate) if active else None


@dataclass(frozen=True)
class _Plan:
    """What is the same in every call of a group: `sizes` are its members' F, `rate` is that of dropout."""

    scaling: float
    sizes: Sequence[int]
    rank: int
    rate: float

    @property
    def parts(self) -> list[tuple[slice, slice]]:
        """Of each member its features and its columns among those of the adapters."""
        rows = _parts(self.sizes)
        return [(part, slice(i * self.rank, (i + 1) * self.rank)) for i, part in enumerate(rows)]


class _Products(torch.autograd.Function):
    """x [T, E] → x·(W + B·A)ᵀ, cut into the members' outputs. `adapters`, A and B of each, are there for gradients.

    `kept`: what dropout leaves of x to each adapter, or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        kept: torch.Tensor | None,
        plan: _Plan,
        *adapters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        low = _low(x, a, kept, plan)
        outputs = []
        for rows, columns in plan.parts:  # each output by itself: what reads it wants it in one piece
            y = F.linear(x, weight[rows], None if bias is None else bias[rows])
            torch.ops.surogate.add_product_(y, low[:, columns], b[rows, columns].T)
            outputs.append(y)
        ctx.save_for_backward(x, low, weight, a, b, kept)
        ctx.plan, ctx.dtype = plan, adapters[0].dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx, found = _gradients(ctx, torch.cat(grads, -1), *ctx.saved_tensors)
        return (dx, *[None] * 6, *found)


class _GatedProducts(torch.autograd.Function):
    """The same of gate and up, x [T, E] → silu(gate)·up [T, F/2]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        kept: torch.Tensor | None,
        plan: _Plan,
        *adapters: torch.Tensor,
    ) -> torch.Tensor:
        low, y = _low(x, a, kept, plan), F.linear(x, weight)
        ctx.save_for_backward(y, x, low, weight, a, b, kept)
        ctx.plan, ctx.dtype = plan, adapters[0].dtype
        result: torch.Tensor = torch.ops.surogate.gated(y, low, b)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, x, low, weight, a, b, kept = ctx.saved_tensors
        dy = torch.ops.surogate.gated_gradient(y, low, b, grads[0])
        dx, found = _gradients(ctx, dy, x, low, weight, a, b, kept)
        return (dx, *[None] * 5, *found)


def _low(x: torch.Tensor, a: torch.Tensor, kept: torch.Tensor | None, plan: _Plan) -> torch.Tensor:
    """What the adapters' A make of x, [T, R]."""
    if kept is None:
        return x @ a.T
    parts = [dropped(x, kept, member) @ a[columns].T for member, (_, columns) in enumerate(plan.parts)]
    return torch.cat(parts, -1) / (1 - plan.rate)


def _gradients(
    ctx: Any,
    dy: torch.Tensor,
    x: torch.Tensor,
    low: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """From dy [T, F] the gradients of x, where it is needed, and of the adapters."""
    plan: _Plan = ctx.plan
    dlow = dy @ b if kept is None else (dy @ b) / (1 - plan.rate)
    dx = dy @ weight if ctx.needs_input_grad[0] else None
    db = dy.T @ low
    if kept is None:
        da = dlow.T @ x
        if dx is not None:
            torch.ops.surogate.add_product_(dx, dlow, a)
    else:
        da = torch.empty_like(a)
        for member, (_, columns) in enumerate(plan.parts):
            da[columns] = dlow[:, columns].T @ dropped(x, kept, member)
            if dx is not None:
                dx += dropped(dlow[:, columns] @ a[columns], kept, member)
    found = []
    for rows, columns in plan.parts:
        found.append(da[columns].to(ctx.dtype) * plan.scaling)
        found.append(db[rows, columns].to(ctx.dtype))
    return dx, found


def _parts(sizes: Sequence[int]) -> list[slice]:
    """The members' features among those of the group."""
    starts = itertools.accumulate(sizes, initial=0)
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]


def _is_plain(layer: torch.nn.Module) -> bool:
    """Whether it is a linear layer with one adapter, and nothing else to it."""
    if type(layer) is not LoraLinear:
        return False
    found: Any = layer
    return (
        type(found.base_layer) is torch.nn.Linear
        and isinstance(found.lora_dropout[ADAPTER], torch.nn.Dropout | torch.nn.Identity)
        and list(found.lora_A) == [ADAPTER]
        and not found.base_layer.weight.requires_grad
        and not any(found.use_dora.values())
        and found.lora_B[ADAPTER].bias is None
    )


def _rate(layer: Any) -> float:
    """Of dropout before its adapter; PEFT has another module there for none."""
    dropout = layer.lora_dropout[ADAPTER]
    return float(dropout.p) if isinstance(dropout, torch.nn.Dropout) else 0.0


def _fit(members: Sequence[Any]) -> bool:
    """Whether layers can be a group: equal in all but their number of outputs."""
    kinds = {
        (
            layer.base_layer.in_features,
            layer.base_layer.weight.dtype,
            layer.base_layer.bias is None,
            layer.r[ADAPTER],
            layer.scaling[ADAPTER],
            layer.lora_A[ADAPTER].weight.dtype,
            _rate(layer),
        )
        for layer in members
    }
    return len(kinds) == 1 and len(members) <= MOST_LAYERS
