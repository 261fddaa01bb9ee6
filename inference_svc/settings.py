"""Settings of the inference service: those of every service, where the engine's keys come from, and its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from surogate.config.service import ServiceSettings, read_settings_file


class InferenceSettings(ServiceSettings):
    """One inference replica. `--config infer.yaml` gives the engine's keys; flags of the same name come before it."""

    model_config = SettingsConfigDict(env_prefix="SUROGATE_INFERENCE_")

    config: Path | None = None
    """File with the keys of infer.yaml, as YAML or JSON."""

    model: str | None = None
    """Model: a directory with config.json and safetensors weights, or a hub name."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Compute type; auto is the checkpoint's own, and bfloat16 for a float32 one."""

    max_model_len: int | None = Field(None, ge=2)
    """Longest prompt plus completion in tokens; unset is the model's own."""

    max_num_seqs: int | None = Field(None, ge=1)
    """Sequences generated at once; unset is 128 on a CPU and vLLM's own choice on a GPU."""

    enforce_eager: bool | None = None
    """No compilation and no CUDA graphs. A CPU always runs eagerly: compiling there takes longer than it saves."""

    tp: int | None = Field(None, ge=1)
    """GPUs that one replica is split over."""

    enable_lora: bool | None = None
    """Whether adapters can be pushed."""

    max_lora_rank: int | None = Field(None, ge=1)
    """Largest adapter rank that can be pushed; unset is 16."""

    enable_prefix_caching: bool | None = None
    """Whether prompts that begin alike share their keys and values; unset is on."""

    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of a GPU's memory to use."""

    seed: int | None = Field(None, ge=0)
    """Seed of the engine, for requests that bring none; unset is 0."""

    kv_cache_bytes: int | None = Field(None, ge=1 << 20)
    """Memory for keys and values on a CPU. Unset is what max_num_seqs full sequences need, at most 4 GiB or a quarter
    of the free memory."""

    max_queue: int | None = Field(None, ge=1)
    """Sequences that may wait beyond those being generated; more are refused with RESOURCE_EXHAUSTED. Unset is four
    times max_num_seqs."""

    delta_updates: bool = False
    """Keep the images of full and delta updates in memory, so that delta updates can build on them. On the checkpoint
    as loaded (base version 0) they can always build."""

    await_weights: bool = False
    """Report SERVING only when the weights to serve are there: after a push, or when somebody has confirmed those of
    the model as loaded. For replicas that an orchestrator keeps."""

    update_ttl: float = Field(600.0, gt=0)
    """Seconds after which a weight update to which nothing arrives any more is dropped."""

    @model_validator(mode="before")
    @classmethod
    def _listen_as_configured(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Without an address of its own, a service that is given infer.yaml listens on the host and port there."""
        if data.get("config") and not data.get("listen"):
            config = read_settings_file(Path(data["config"]))
            if "port" in config or "host" in config:
                return {**data, "listen": f"{config.get('host') or '127.0.0.1'}:{config.get('port', 8000)}"}
        return data
