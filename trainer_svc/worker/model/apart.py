"""Whether an architecture computes the documents of a packed row as it computes each of them alone: asked, not assumed.

Recurrent layers carry a state from one document into the next, and some architectures count positions in a way of their
own: their loss would be another one, and nothing would say so.
"""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from surogate.errors import ConfigError, Violation
from trainer_svc.worker.model.attention import NAME, Documents
from trainer_svc.worker.model.precision import Precision

FIRST, SECOND = 5, 9
"""Tokens of the documents that a model is asked about."""

EXACT, ROUNDED, STATEFUL = 1e-3, 0.25, 0.05
"""Largest difference of logits, as a part of them, in float32, and in half precision, where the order of a sum may
choose another expert: what has other positions differs by as much as there is. Less is let through where there may be
layers that carry a state, which fades.
"""

_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What a model's own forward ends with where it needs something that packed rows do not have."""


@torch.no_grad()
def check_apart(model: PreTrainedModel, precision: Precision) -> None:
    """Compares logits of two documents in a row with those of each, by the attention that the model brings.

    Raises ConfigError for an architecture whose documents would not be kept apart, or that fails on a packed row.
    """
    was_training = model.training
    model.eval()
    try:
        with precision.computing(torch.device(model.device)):
            apart = _difference(model)
    except _FAILURES as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _refused(model, f"fails on a packed row ({type(error).__name__}: {first})") from error
    finally:
        model.set_attn_implementation(NAME)
        model.train(was_training)
    if not math.isfinite(apart):
        where = ", ".join(_not_finite(model)[:3])
        what = f"weights that are not finite ({where})" if where else "logits that are not finite"
        raise ConfigError.of([Violation("train.model", f"has {what}: it was damaged, or has diverged; choose another")])
    rounded = STATEFUL if getattr(model, "_is_stateful", False) else ROUNDED
    if not apart <= (EXACT if precision.autocast is None else rounded):
        raise _refused(model, "mixes the documents of a packed row, or counts their positions otherwise than alone")


def _difference(model: PreTrainedModel) -> float:
    """The larger one of the documents' median differences of a token's logits, as a part of their size."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    row = torch.arange(3, 3 + FIRST + SECOND, device=model.device) % vocabulary
    positions = torch.cat([torch.arange(length, device=model.device) for length in (FIRST, SECOND)])[None]
    documents = Documents.of([FIRST, SECOND]).to(torch.device(model.device))
    packed = model(input_ids=row[None], position_ids=positions, use_cache=False, documents=documents).logits[0].float()
    model.set_attn_implementation("eager")  # the one that knows soft caps and sinks
    found = []
    for part in (slice(FIRST), slice(FIRST, None)):
        alone = model(input_ids=row[None, part], use_cache=False).logits[0].float()
        found.append(float(((packed[part] - alone).norm(dim=-1) / alone.norm(dim=-1).clamp(min=1e-12)).median()))
    return max(found)


def _not_finite(model: PreTrainedModel) -> list[str]:
    """Names of weights with infinities or none-numbers; packed ones of quantised layers have neither."""
    plain = ((name, weight) for name, weight in model.named_parameters() if weight.is_floating_point())
    return [name for name, weight in plain if weight.element_size() > 1 and not weight.isfinite().all()]


def _refused(model: PreTrainedModel, what: str) -> ConfigError:
    name = type(model).__name__
    text = f"the architecture {name} {what}, so that it cannot be trained here; choose a model of another architecture"
    return ConfigError.of([Violation("train.model", text)])
