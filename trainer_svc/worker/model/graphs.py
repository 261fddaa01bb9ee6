"""Forward and backward passes of a micro-batch as a CUDA graph: recorded once for each shape, then started as a whole.

A decoder's kernels are so short that launching them one by one takes longer than they do. Recorded are the passes of
supervised training on one rank; what the numbers are is the same either way.

Legend: T tokens of the row, M trained tokens.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from trainer_svc.worker.model.attention import Bucket
from trainer_svc.worker.model.batch import PackedBatch
from trainer_svc.worker.model.forward import PackedForward

MOST_GRAPHS = 8
"""Shapes that are recorded; the passes of others are launched kernel by kernel."""

PARTS = 8
"""M is rounded up to a multiple of T / PARTS, so that few different shapes occur."""

ADDED_TOGETHER = 1 << 27
"""Most weights whose gradients are made in full and then added by one operation, instead of one after the other."""

_log = logging.getLogger("trainer.worker")

_Shape = tuple[int, int, int, int, tuple[Bucket, ...]]


@dataclass(frozen=True)
class _Recorded:
    """A graph and the memory that it reads and writes. `learned`: what the sum of logprobs is divided by."""

    graph: torch.cuda.CUDAGraph
    batch: PackedBatch
    learned: torch.Tensor
    loss: torch.Tensor


class MicroBatchGraphs:
    """Adds the gradients of micro-batches' losses to those that `weights` have.

    `refresh` is called when weights may be others than in the pass before: it copies what passes read in another form.
    """

    def __init__(
        self, forward: PackedForward, weights: Iterable[torch.nn.Parameter], refresh: Callable[[], None] | None
    ) -> None:
        self._forward = forward
        self._refresh = refresh
        self._gradients = _Gradients(weights)
        self._seen: Counter[_Shape] = Counter()
        self._recorded: dict[_Shape, _Recorded] = {}
        self._device = torch.device(forward.model.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._refreshing: torch.cuda.CUDAGraph | None = None
        self._possible = True

    def backward(self, batch: PackedBatch, learned: int) -> torch.Tensor:
        """The loss, 0-d: minus the sum of the batch's logprobs over `learned`. Its gradient has been added."""
        batch = _filled_up(batch)
        shape = _shape_of(batch)
        self._seen[shape] += 1
        recorded = self._recorded.get(shape)
        if recorded is None and self._possible and self._seen[shape] > 1 and len(self._recorded) < MOST_GRAPHS:
            recorded = self._record(batch, shape)
        if recorded is None:
            if self._refresh is not None:
                self._refresh()
            return self._passes(batch.to(self._device), torch.tensor(float(learned), device=self._device))
        if self._gradients.take_over() and self._refreshing is not None:  # a new step
            self._refreshing.replay()
        for name, place in _tensors(recorded.batch).items():
            place.copy_(_tensors(batch)[name].pin_memory(), non_blocking=True)
        recorded.learned.fill_(learned)
        recorded.graph.replay()
        return recorded.loss.clone()

    def _passes(self, batch: PackedBatch, learned: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = -self._forward(batch, summed=True)[0] / learned
        if self._gradients.are_small:
            self._gradients.take_over()
            self._gradients.add_of(loss)
        else:
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _record(self, batch: PackedBatch, shape: _Shape) -> _Recorded | None:
        """The graph of this shape, of which a batch has gone through before: all is compiled. None if it cannot be."""
        graph, placed = torch.cuda.CUDAGraph(), batch.to(self._device)
        learned = torch.ones((), device=self._device)
        self._gradients.take_over()
        try:
            if self._refresh is not None and self._refreshing is None:
                self._refresh()
                self._refreshing = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._refreshing, pool=self._pool, capture_error_mode="thread_local"):
                    self._refresh()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                loss = self._passes(placed, learned)
        except RuntimeError as error:
            self._possible = False
            _log.warning("micro-batches cannot be recorded as CUDA graphs, and train slower: %s", error)
            return None
        if self._refreshing is not None:
            self._refreshing.replay()
        self._recorded[shape] = _Recorded(graph, placed, learned, loss)
        return self._recorded[shape]


class _Gradients:
    """Memory for the gradients that stays where it is: a graph adds to fixed addresses."""

    def __init__(self, weights: Iterable[torch.nn.Parameter]) -> None:
        self._weights = list(weights)
        self._flat: dict[torch.dtype, torch.Tensor] = {}
        self._views: list[torch.Tensor] = []

    @property
    def are_small(self) -> bool:
        """Whether one more of each may be held."""
        return sum(weight.numel() for weight in self._weights) <= ADDED_TOGETHER

    def add_of(self, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss`."""
        found = torch.autograd.grad(loss, self._weights, allow_unused=True)
        pairs = [(view, grad) for view, grad in zip(self._views, found, strict=True) if grad is not None]
        torch._foreach_add_([view for view, _ in pairs], [grad for _, grad in pairs])

    def take_over(self) -> bool:
        """Moves the gradients that there are here, and sets the others to zero; false if all were here already."""
        if not self._views:
            self._make()
        given = [weight.grad for weight in self._weights]
        if all(grad is view for grad, view in zip(given, self._views, strict=True)):
            return False
        for flat in self._flat.values():
            flat.zero_()
        for weight, grad, view in zip(self._weights, given, self._views, strict=True):
            if grad is not None:
                view.copy_(grad)
            weight.grad = view
        return True

    def _make(self) -> None:
        sizes: Counter[torch.dtype] = Counter()
        places = []
        for weight in self._weights:
            places.append(sizes[weight.dtype])
            sizes[weight.dtype] += -(-weight.numel() // 64) * 64  # kernels read 16 bytes at a time
        device = self._weights[0].device
        self._flat = {dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
        self._views = [
            self._flat[weight.dtype][place : place + weight.numel()].view(weight.shape)
            for weight, place in zip(self._weights, places, strict=True)
        ]


def _filled_up(batch: PackedBatch) -> PackedBatch:
    """The batch with further targets that stand for no token."""
    missing = -len(batch.targets) % max(batch.input_ids.shape[1] // PARTS, 1)
    return replace(
        batch,
        predict=F.pad(batch.predict, (0, missing)),
        targets=F.pad(batch.targets, (0, missing), value=-1),
        owner=F.pad(batch.owner, (0, missing)),
    )


def _shape_of(batch: PackedBatch) -> _Shape:
    documents = batch.documents
    even = documents.buckets if documents.even else ()
    return (batch.input_ids.shape[1], len(batch.targets), len(documents.offsets), documents.longest, even)


def _tensors(batch: PackedBatch) -> Mapping[str, torch.Tensor]:
    """What the passes read of a batch."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "offsets": batch.documents.offsets,
        "predict": batch.predict,
        "targets": batch.targets,
    }
