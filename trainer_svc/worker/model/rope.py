"""`rope_scaling` and `max_model_len`, applied to the configuration of a model."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from surogate.config.train import TrainConfig
from surogate.rope import as_object, scale_rope
from trainer_svc.worker.errors import config_error


def apply_context(config: PretrainedConfig, train: TrainConfig) -> None:
    """Sets RoPE scaling and the context length. Raises ConfigError if sequences would not fit into the context."""
    text = config.get_text_config()
    native = getattr(text, "max_position_embeddings", None)
    longest = train.max_model_len
    if train.rope_scaling is not None:
        scaling = as_object(train.rope_scaling, longest)
        scale_rope(text, scaling, ROPE_INIT_FUNCTIONS, "train.rope_scaling")
        return
    if longest is not None and getattr(text, "rope_parameters", None):
        text.max_position_embeddings = longest
    elif longest is not None and native is not None and longest > native:
        raise config_error(
            "max_model_len",
            f"is {longest}, and this {config.model_type} has learnt {native} positions; lower or remove it",
        )
    limit = longest or native
    if limit is not None and train.sequence_len > limit:
        raise config_error(
            "sequence_len",
            f"{train.sequence_len} exceeds the model's context of {limit} tokens; lower it or set max_model_len and "
            "rope_scaling",
        )
