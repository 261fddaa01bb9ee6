"""The model as the trainer uses it: packed documents in, log-probabilities of their learned tokens out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from surogate.errors import FailedPreconditionError
from trainer_svc.worker.batch import PackedBatch
from trainer_svc.worker.logprobs import logprobs_of, token_logprobs
from trainer_svc.worker.modeling import vocab_size
from trainer_svc.worker.precision import Precision

PROBE_TOKENS = 8
"""Length of the sequence on which a model is asked, once, whether its logits are its output embedding alone."""


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
        self._chunks = chunks
        self._plain_head = self._has_plain_head()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.model.device)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Weights that are trained, by their name in the model, in its order; shared ones once."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def train(self, mode: bool) -> None:
        """Switches dropout on or off."""
        self.model.train(mode)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, the model is the base: the reference policy. Raises FailedPreconditionError without an adapter."""
        if self.adapter is None:
            raise FailedPreconditionError(
                "a reference policy needs an adapter to switch off: set lora: true, or beta: 0"
            )
        with self.adapter.disable_adapter():
            yield

    def logprobs(
        self, batch: PackedBatch, temperature: torch.Tensor | None = None, *, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probability of each of the M targets, float32, at `temperature[M]`; and the entropy if asked for."""
        batch = batch.to(self.device)
        with self.precision.computing(self.device):
            if not self._plain_head:
                logits = self._logits(batch)
                return logprobs_of(logits, batch.targets, temperature, with_entropy=with_entropy)
            hidden = self._hidden(batch).index_select(0, batch.predict)
            return token_logprobs(
                hidden,
                self.model.get_output_embeddings(),
                batch.targets,
                temperature,
                vocab_size=self.vocab_size,
                chunks=self._chunks,
                with_entropy=with_entropy,
            )

    def _hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Last hidden states [T, E]."""
        output = self.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, documents=batch.documents
        )
        return output.last_hidden_state[0]  # type: ignore[no-any-return]

    def _logits(self, batch: PackedBatch) -> torch.Tensor:
        """Logits [M, V] by the model's own forward, for heads that do more than multiply."""
        partly = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        keep = {"logits_to_keep": batch.predict} if partly else {}
        logits = self.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            documents=batch.documents,
            **keep,
        ).logits[0]
        return logits if partly else logits.index_select(0, batch.predict)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _has_plain_head(self) -> bool:
        """Whether logits are the output embedding applied to the last hidden states, and nothing else."""
        head = self.model.get_output_embeddings()
        if head is None:
            return False
        was_training = self.model.training
        self.model.eval()
        ids = torch.arange(PROBE_TOKENS, device=self.device)[None] % self.vocab_size
        with self.precision.computing(self.device):
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            expected = self.model(input_ids=ids, use_cache=False).logits
            same = torch.allclose(head(hidden).float(), expected.float(), rtol=1e-3, atol=1e-6)
        self.model.train(was_training)
        return same
