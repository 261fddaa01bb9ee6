"""What a loss says about the tokens it saw, in a form that adds up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from trainer_svc.worker.loss.batch import LossBatch
from trainer_svc.worker.loss.numeric import k3


class LossMetrics(Mapping[str, float]):
    """Means and maxima over the trainable tokens of one or more calls, by the names of docs/metrics.md.

    Reading an item gives the mean (or maximum) as a float; `a + b` gives that of both calls' tokens together, so the
    order and the size of micro-batches do not matter. What was summed stays on its device until it is read. For ranks:
    sum `sums` and `count`, take the maximum of `maxima`.
    """

    def __init__(self, sums: Mapping[str, Tensor], maxima: Mapping[str, Tensor], count: Tensor) -> None:
        self.sums = dict(sums)
        """Sums over trainable tokens, 0-d float64 each."""
        self.maxima = dict(maxima)
        """Maxima over trainable tokens, 0-d float64 each; 0 without tokens."""
        self.count = count
        """Number of trainable tokens, 0-d float64."""

    def cpu(self) -> LossMetrics:
        """The same in the host's memory: what one rank tells another."""
        sums = {name: value.cpu() for name, value in self.sums.items()}
        return LossMetrics(sums, {name: value.cpu() for name, value in self.maxima.items()}, self.count.cpu())

    def __getitem__(self, name: str) -> float:
        if name in self.maxima:
            return float(self.maxima[name])
        return float(self.sums[name] / self.count.clamp(min=1))

    def __iter__(self) -> Iterator[str]:
        yield from self.sums
        yield from self.maxima

    def __len__(self) -> int:
        return len(self.sums) + len(self.maxima)

    def __add__(self, other: LossMetrics) -> LossMetrics:
        sums = {name: self.sums[name] + other.sums[name] for name in self.sums}
        maxima = {name: torch.maximum(self.maxima[name], other.maxima[name]) for name in self.maxima}
        return LossMetrics(sums, maxima, self.count + other.count)


@torch.no_grad()
def loss_metrics(
    batch: LossBatch, dropped: Mapping[str, Tensor], means: Mapping[str, Tensor] | None = None
) -> LossMetrics:
    """The metrics every loss reports, and its own.

    `dropped`: by the name of each mask, the tokens whose policy gradient it zeroed, bool [T]; masks may overlap,
    `masked/fraction` counts a token once. `means`: further values to average, [T], by metric name.
    """
    union = torch.zeros_like(batch.mask)
    for tokens in dropped.values():
        union = union | tokens
    values = {
        "ratio/mean": batch.ratio,
        "mismatch_kl": k3(batch.log_ratio),
        "masked/fraction": union,
        **{f"masked/{name}": tokens for name, tokens in dropped.items()},
        **(means or {}),
    }
    sums = {name: tensor.double().where(batch.mask, 0).sum() for name, tensor in values.items()}
    largest = batch.ratio.double().where(batch.mask, 0)
    maximum = largest.max() if len(largest) else largest.sum()
    return LossMetrics(sums, {"ratio/max": maximum}, batch.mask.double().sum())
