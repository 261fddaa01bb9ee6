"""How a model makes logits of its last hidden states: found out once, so that they can be made a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

from trainer_svc.worker.model.precision import Precision

PROBE_TOKENS = 8
"""Length of the sequence on which a model is asked, once, how its logits come about."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states [m, E] → logits [m, V]."""

Shape = Callable[[Head], Head]
"""What a model does around its output embedding."""


@torch.no_grad()
def find_head(model: PreTrainedModel, precision: Precision) -> Shape | None:
    """What `model` does around its output embedding; None if it is none of what is known here.

    Each candidate's logits are compared with those of the model's own forward.
    """
    embedding = model.get_output_embeddings()
    if embedding is None or model.base_model is model:
        return None
    was_training = model.training
    model.eval()
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % rows
    with precision.computing(torch.device(model.device)):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if hidden.shape[-1] != embedding.weight.shape[-1]:
            model.train(was_training)
            return None
        expected = model(input_ids=ids, use_cache=False).logits.float()
        shapes = [
            shape
            for shape in _candidates(model)
            if torch.allclose(shape(embedding)(hidden).float(), expected, rtol=1e-3, atol=1e-6)
        ]
    model.train(was_training)
    return shapes[0] if shapes else None


def _candidates(model: PreTrainedModel) -> Iterator[Shape]:
    """The output embedding alone; capped (Gemma 2); times (Cohere) or through (Granite) a number."""
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        yield lambda head: lambda hidden: torch.tanh(head(hidden) / cap) * cap
    yield lambda head: head
    factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    if factor:
        yield lambda head: lambda hidden: head(hidden) * factor
    if divisor:
        yield lambda head: lambda hidden: head(hidden) / divisor
