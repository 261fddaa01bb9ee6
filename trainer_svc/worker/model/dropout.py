"""What a model's own layers draw at random in training: dropout of GPT-2 or OPT, the jitter of some routers."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def has_dropout(model: PreTrainedModel) -> bool:
    """Whether the model draws random numbers in training."""
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())


def draw_nothing(model: PreTrainedModel) -> None:
    """Puts the model into evaluation, in which nothing is drawn, but for layers that recompute, only in training.

    Some of these drop values themselves (OPT), by a rate of theirs: it becomes 0.
    """
    model.eval()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
            for name in [name for name, value in vars(layer).items() if "drop" in name and isinstance(value, float)]:
                setattr(layer, name, 0.0)
