"""`rope_scaling` for vLLM: the configuration that it reads is scaled as the trainer scales its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from inference_svc.options import EngineOptions
from surogate.rope import as_object, scale_rope

DUMMY = "dummy_"
"""What the type of a model begins with that vLLM only asks with."""


def rope_override(options: EngineOptions) -> Callable[[PretrainedConfig], PretrainedConfig] | None:
    """What vLLM calls with the configuration (`hf_overrides`). It goes to other processes: it can be pickled."""
    scaling = options.rope_scaling
    if scaling is None:
        return None
    # An object says all that it needs: what a job's sequences may have is not the length of its model.
    length = options.max_model_len if isinstance(scaling, str) else None
    return partial(_scaled, scaling=as_object(scaling, length))


def _scaled(config: PretrainedConfig, scaling: Mapping[str, Any]) -> PretrainedConfig:
    if not config.model_type.startswith(DUMMY):
        scale_rope(config.get_text_config(), scaling, ROPE_INIT_FUNCTIONS, "rope_scaling")
    return config
