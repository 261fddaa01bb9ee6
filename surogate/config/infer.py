"""infer.yaml: the engine that samples."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from surogate.config import keys
from surogate.config.base import ConfigModel, Devices, Float, Rank, Size, Text, Tokens, problem, refuse
from surogate.config.types import Dtype, RopeScaling


class InferConfig(ConfigModel):
    """infer.yaml, every key as an attribute of that name."""

    without_effect: ClassVar[frozenset[str]] = keys.INFER_WITHOUT_EFFECT
    not_yet: ClassVar[frozenset[str]] = keys.INFER_NOT_YET

    model: Text | None = None
    """Folder of a Hugging Face model, or its name on the hub. In a GRPO job it may be set in any of the three files."""
    host: Text | None = None
    """Address to listen on. null = loopback."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on when it is served by itself, 0 to 65535. 0 = any. A launcher chooses its own."""
    dtype: Dtype = "auto"
    """Dtype of weights and computation. `auto`: in a GRPO job that of train.yaml, else the model's own."""
    max_model_len: Tokens | None = None
    """Longest prompt and completion together, in tokens, 1 to 16,777,216. null = seq_len of the job, else the model's
    own.
    """
    max_num_seqs: Annotated[Size, Field(le=65_536)] | None = None
    """Sequences that are generated at once, 1 to 65,536. null = the engine's default."""
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"] | None = None
    """Dtype of the key-value cache. null or auto = that of the model. FP8 makes the sampler differ from the trainer."""
    enforce_eager: bool = False
    """Do without compiled graphs: quicker start, slower generation."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    tp: Annotated[Devices, Field(ge=1)] = 1
    """GPUs that share one replica, 1 to 1,024."""
    dp: Annotated[Devices, Field(ge=1)] = 1
    """Replicas, 1 to 1,024."""
    enable_lora: bool = True
    """Serve adapters. Unset in a GRPO job: as `lora` in train.yaml, but false where lora_target_modules names
    `experts`. false with lora: true: after each step the weights that adapters are on are pushed, with the adapter
    merged into them.
    """
    max_lora_rank: Rank | None = None
    """Highest rank of an adapter, 1 to 65,536. null = lora_rank of the job, else 16."""
    max_loras: Annotated[Size, Field(le=1024)] = 8
    """Adapters in one batch, 1 to 1,024."""
    max_cpu_loras: Annotated[Size, Field(le=65_536)] = 100
    """Adapters kept in host memory, max_loras to 65,536."""
    enable_prefix_caching: bool | None = None
    """Keep the key-value cache of common prefixes. null = the engine's default. Never shared between versions of the
    weights.
    """
    gpu_memory_utilization: Annotated[Float, Field(gt=0, le=1)] = 0.9
    """Fraction of a GPU's memory to use, above 0 to 1. No meaning on CPU."""
    rope_scaling: RopeScaling = None
    """RoPE scaling, as in train.yaml, where GRPO takes it from. null = the model's own."""

    @model_validator(mode="after")
    def _adapters_fit(self) -> Self:
        if self.max_cpu_loras < self.max_loras:
            message = f"is {self.max_cpu_loras}, less than max_loras ({self.max_loras})"
            refuse("infer", [problem("max_cpu_loras", message)])
        return self
