"""The order of training: which documents make up a row, and which rows an optimiser step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from trainer_svc.worker.data.packing import efficiency, pack
from trainer_svc.worker.data.store import EncodedData


class StepPlan:
    """Rows of documents, in a new order each epoch, cut into optimiser steps of `micro_batches` times `rows` rows.

    The last step of an epoch takes what is left. Everything follows from the data, the seed and the number of the
    step, so that a resumed run goes on where it stopped without having read what came before.
    """

    def __init__(
        self, data: EncodedData, *, capacity: int, packing: bool, rows: int, micro_batches: int, seed: int
    ) -> None:
        shuffled = np.random.default_rng([seed]).permutation(len(data)).tolist()
        lengths = data.lengths[shuffled].tolist()
        packed = pack(lengths, capacity) if packing else [[index] for index in range(len(shuffled))]
        self._rows = [[shuffled[index] for index in row] for row in packed]
        self._rows_per_batch = rows
        self._rows_per_step = rows * micro_batches
        self._seed = seed
        self._epoch_order: tuple[int, Sequence[int]] = (-1, ())
        self.efficiency = efficiency(lengths, packed, capacity)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in which every document is seen once."""
        return -(-len(self._rows) // self._rows_per_step)

    def epoch(self, step: int) -> float:
        """Epochs done after `step` optimiser steps."""
        return step / self.steps_per_epoch

    def micro_batches(self, step: int) -> list[list[int]]:
        """Documents of each micro-batch of optimiser step `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)[place * self._rows_per_step : (place + 1) * self._rows_per_step]
        return list(join_rows([self._rows[row] for row in order], self._rows_per_batch))

    def _order(self, epoch: int) -> Sequence[int]:
        known, order = self._epoch_order  # read and written as one: threads that read ahead ask as well
        if known != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows)).tolist()
            self._epoch_order = (epoch, order)
        return order


def join_rows(rows: Sequence[Sequence[int]], rows_per_batch: int) -> Iterator[list[int]]:
    """Documents of micro-batches of so many rows each; the last has what is left."""
    for start in range(0, len(rows), rows_per_batch):
        yield [document for row in rows[start : start + rows_per_batch] for document in row]
