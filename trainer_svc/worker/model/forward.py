"""One module from a packed batch to log-probabilities: what ranks wrap, and what a compiler sees."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from trainer_svc.worker.logprobs.logprobs import is_matrix, logprobs_of, summed_logprob, token_logprobs
from trainer_svc.worker.model.batch import PackedBatch
from trainer_svc.worker.model.head import Head, find_head
from trainer_svc.worker.model.precision import Precision


class PackedForward(torch.nn.Module):
    """Calls a model on packed batches. `chunks`: parts, at the least, in which logits are computed."""

    def __init__(self, model: PreTrainedModel, precision: Precision, vocab_size: int, chunks: int) -> None:
        super().__init__()
        self.model = model
        self._precision = precision
        self._vocab_size = vocab_size
        self._chunks = chunks
        self._shape = find_head(model, precision)

    def forward(
        self,
        batch: PackedBatch,
        temperature: torch.Tensor | None = None,
        *,
        with_entropy: bool = False,
        summed: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logprobs [M] and entropy [M] or None; with `summed` the sum of the former alone, 0-d, at temperature 1."""
        with self._precision.computing(self._device):
            if self._shape is None:
                logits = self._logits(batch)
                found = logprobs_of(logits, batch.targets, temperature, with_entropy=with_entropy)
                return (found[0].sum(), None) if summed else found
            hidden = self._hidden(batch).index_select(0, batch.predict)
            head: Head = self._shape(self.model.get_output_embeddings())
            vocab, chunks = self._vocab_size, self._chunks
            if summed:
                return summed_logprob(hidden, head, batch.targets, vocab_size=vocab, chunks=chunks), None
            return token_logprobs(
                hidden, head, batch.targets, temperature, vocab_size=vocab, chunks=chunks, with_entropy=with_entropy
            )

    @property
    def knows_head(self) -> bool:
        """Whether the model's logits are no more than a product with a matrix that is there as such."""
        head = self.model.get_output_embeddings()
        return self._shape is not None and is_matrix(self._shape(head))

    @property
    def _device(self) -> torch.device:
        return torch.device(self.model.device)

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
