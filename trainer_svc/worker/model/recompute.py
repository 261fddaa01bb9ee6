"""Activations that are computed again for the gradient instead of being kept (`recompute`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from surogate.config.train import TrainConfig
from trainer_svc.worker.errors import config_error
from trainer_svc.worker.model.dropout import has_dropout

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm_v2.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._flash_attention_forward.default,
}
"""What `selective` keeps the results of: products and attention, which cost most of the time."""


def use_recompute(model: PreTrainedModel, train: TrainConfig) -> None:
    """Has each decoder layer keep its input (`true`), or that and its products (`selective`), and redo the rest.

    Raises ConfigError for an architecture that transformers cannot do this for.
    """
    if train.recompute is False:
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": has_dropout(model)}
    if train.recompute == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    except ValueError as error:
        raise config_error(
            "recompute", f"{type(model).__name__} has no layers to recompute: set it to false"
        ) from error


def _policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    del context, args, kwargs
    return CheckpointPolicy.MUST_SAVE if function in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
