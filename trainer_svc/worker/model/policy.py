"""The model as the trainer uses it: packed documents in, log-probabilities of their learned tokens out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from surogate.errors import FailedPreconditionError
from trainer_svc.worker.model.batch import PackedBatch
from trainer_svc.worker.model.cuda import Compiled
from trainer_svc.worker.model.dropout import draw_nothing, has_dropout
from trainer_svc.worker.model.forward import PackedForward
from trainer_svc.worker.model.graphs import MicroBatchGraphs
from trainer_svc.worker.model.modeling import vocab_size
from trainer_svc.worker.model.precision import Precision
from trainer_svc.worker.model.spread import last_of_step, spread

BLOCK = 128
"""On CUDA rows are as long as a multiple of this: products are fast, and few different lengths occur."""


class Policy:
    """A causal language model, with or without an adapter.

    `model` is the transformers model (the adapter's layers are inside it), `adapter` the PEFT model around it or None.
    """

    def __init__(
        self, model: PreTrainedModel, precision: Precision, adapter: PeftModel | None, *, chunks: int = 1
    ) -> None:
        self.model = model
        self.precision = precision
        self.adapter = adapter
        self.vocab_size = vocab_size(model)
        self.forward = PackedForward(model, precision, self.vocab_size, chunks)
        """What is called for every batch."""
        self._training: torch.nn.Module = self.forward
        self.compiled: Compiled | None = None
        """What is compiled for CUDA; see cuda.py."""
        self._draws = True

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.model.device)

    @property
    def block(self) -> int:
        """What packed rows are laid out in: see `collate`."""
        return BLOCK if self.device.type == "cuda" else 1

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Weights that are trained, by their name in the model, in its order; shared ones once."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def spread(self, zero_level: int) -> None:
        """Has all ranks train the model together from here on; see spread.py."""
        self._training = spread(self.forward, zero_level)

    def graphs(self) -> MicroBatchGraphs | None:
        """Supervised passes as CUDA graphs; None where they cannot be recorded."""
        weights = self.trainable().values()
        own_format = all(getattr(weight, "grad_dtype", None) in (None, weight.dtype) for weight in weights)
        # Whether random numbers are restored for recomputation inside a graph is nowhere promised.
        redrawn = self.model.is_gradient_checkpointing and has_dropout(self.model)
        possible = self.compiled is not None and self.forward.knows_head and own_format and not redrawn
        return MicroBatchGraphs(self.forward, weights, self._refresher) if possible else None

    def last_of_step(self, last: bool) -> AbstractContextManager[Any]:
        """The context of a micro-batch's forward and backward passes; `last`: it is this rank's last of the step."""
        return last_of_step(self._training, last)

    def train(self, mode: bool) -> None:
        """Switches dropout on or off; after `draw_nothing` it stays off."""
        if self._draws and self.model.training != mode:
            self.model.train(mode)

    def draw_nothing(self) -> None:
        """Has training, too, draw no random numbers: the policy that learns is the one that was sampled."""
        self._draws = False
        draw_nothing(self.model)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, the model is the base: the reference policy. Raises FailedPreconditionError without an adapter."""
        if self.adapter is None:
            raise FailedPreconditionError(
                "a reference policy needs an adapter to switch off: set lora: true, or beta: 0"
            )
        with self.adapter.disable_adapter():
            yield

    @property
    def _refresher(self) -> Callable[[], None] | None:
        """What has compiled layers compute with the adapter as it is now; None where they do anyway."""
        adapters = None if self.compiled is None else self.compiled.adapters
        return None if adapters is None else adapters.refresh

    def _refresh(self) -> None:
        if self._refresher is not None:
            self._refresher()

    def logprobs(
        self, batch: PackedBatch, temperature: torch.Tensor | None = None, *, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probability of each of the M targets, float32, at `temperature[M]`; and the entropy if asked for."""
        self._refresh()
        module = self._training if torch.is_grad_enabled() else self.forward
        found: tuple[torch.Tensor, torch.Tensor | None] = module(
            batch.to(self.device), temperature, with_entropy=with_entropy
        )
        return found

    def summed_logprob(self, batch: PackedBatch) -> torch.Tensor:
        """The sum of `logprobs`, 0-d: a supervised loss, whose gradient costs less this way."""
        self._refresh()
        total: torch.Tensor = self._training(batch.to(self.device), summed=True)[0]
        return total
