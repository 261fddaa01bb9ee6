"""What the engine is started with: infer.yaml's keys with the flags on top."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from pydantic import ValidationError

from inference_svc.settings import InferenceSettings
from surogate.config.infer import InferConfig
from surogate.config.problems import violations_of
from surogate.config.service import read_settings_file
from surogate.errors import ConfigError, Violation

DEFAULT_LORA_RANK = 16


@dataclass(frozen=True)
class EngineOptions:
    """Keys of infer.yaml that start one replica; names and meanings are the file's."""

    model: str
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    kv_cache_dtype: str | None = None
    enforce_eager: bool = False
    trust_remote_code: bool = False
    tp: int = 1
    enable_lora: bool = True
    max_lora_rank: int | None = None
    max_loras: int = 8
    max_cpu_loras: int = 100
    enable_prefix_caching: bool | None = None
    gpu_memory_utilization: float = 0.9
    rope_scaling: Any = None
    seed: int | None = None
    kv_cache_bytes: int | None = None

    @property
    def lora_rank_limit(self) -> int:
        """Largest adapter rank that is taken."""
        return self.max_lora_rank or DEFAULT_LORA_RANK


def resolve_options(settings: InferenceSettings) -> EngineOptions:
    """The options that `settings` ask for. Raises ConfigError naming the key."""
    values = _from_file(settings)
    names = {field.name for field in fields(EngineOptions)}
    given = {name: getattr(settings, name) for name in names if getattr(settings, name, None) is not None}
    merged = {**{key: value for key, value in values.items() if key in names}, **given}
    if not merged.get("model"):
        raise ConfigError.of([Violation("model", "no model is given; set it in --config FILE or with --model DIR")])
    return replace(EngineOptions(model=str(merged.pop("model"))), **merged)


def _from_file(settings: InferenceSettings) -> dict[str, Any]:
    if settings.config is None:
        return {}
    try:
        config = InferConfig.model_validate(read_settings_file(settings.config))
    except ValidationError as error:
        raise ConfigError.of(violations_of(error)) from error
    return {key: value for key, value in config.model_dump().items() if value is not None}
