"""EngineOptions as vLLM's arguments, with defaults that suit the machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from inference_svc.model_files import ModelFiles
from inference_svc.options import EngineOptions
from inference_svc.plugin import WEIGHT_BACKEND
from inference_svc.vllm_backend.rope import rope_override
from surogate.errors import ConfigError, Violation

_CPU_MAX_NUM_SEQS = 128
_CPU_BLOCK_SIZE = 32
"""Tokens a block of keys and values: the least that the CPU kernels take, so that short prompts share theirs too."""
_CPU_KV_LIMIT = 4 << 30
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def engine_arguments(options: EngineOptions, files: ModelFiles | None) -> AsyncEngineArgs:
    """Arguments for AsyncLLM. `files` is None for a hub name. Raises ConfigError."""
    arguments: dict[str, Any] = {
        "model": options.model,
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "kv_cache_dtype": options.kv_cache_dtype or "auto",
        "enforce_eager": options.enforce_eager,
        "trust_remote_code": options.trust_remote_code,
        "tensor_parallel_size": options.tp,
        "enable_prefix_caching": options.enable_prefix_caching is not False,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "seed": options.seed or 0,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": 1,
        "disable_log_stats": False,  # its queue and its times are among our metrics
        "weight_transfer_config": {"backend": WEIGHT_BACKEND},
        "worker_extension_cls": "inference_svc.vllm_backend.worker.WorkerExtension",
        "hf_overrides": rope_override(options),
        "use_tqdm_on_load": False,
    }
    arguments |= _lora_arguments(options, files) if options.enable_lora else {}
    arguments |= _cpu_arguments(options, files) if current_platform.is_cpu() else {}
    return AsyncEngineArgs(**{key: value for key, value in arguments.items() if value is not None})


def _lora_arguments(options: EngineOptions, files: ModelFiles | None) -> dict[str, Any]:
    rank = next((rank for rank in _LORA_RANKS if rank >= options.lora_rank_limit), None)
    if rank is None:
        raise ConfigError.of(
            [Violation("max_lora_rank", f"vLLM takes adapters of rank {_LORA_RANKS[-1]} at most; lower it")]
        )
    # A replica serves one adapter, the policy: further slots would only be memory.
    arguments = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}
    # Of a mixture's experts vLLM would hold adapters, too, which the trainer never pushes.
    return arguments | ({"lora_target_modules": files.linear_names} if files and files.has_experts else {})


def _cpu_arguments(options: EngineOptions, files: ModelFiles | None) -> dict[str, Any]:
    if files is not None:
        _check_heads(files)
    seqs = options.max_num_seqs or _CPU_MAX_NUM_SEQS
    arguments: dict[str, Any] = {
        "enforce_eager": True,
        "max_num_seqs": seqs,
        "block_size": _CPU_BLOCK_SIZE,
        "kv_cache_memory_bytes": options.kv_cache_bytes or _cpu_kv_bytes(options, files, seqs),
    }
    if options.tp == 1:
        # The worker in the engine's own process: one process fewer to start, and no hop a step. vLLM avoids it only
        # because thread binding needs the environment set beforehand, and nothing is bound here.
        arguments["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    return arguments


def _check_heads(files: ModelFiles) -> None:
    """Raises ConfigError for attention that vLLM has no CPU kernel for: it would find out with the first request."""
    sizes, found = CPUAttentionBackend.get_supported_head_sizes(), _head_dim(files.text_config)
    if found and "kv_lora_rank" not in files.text_config and found not in sizes:
        known = ", ".join(map(str, sizes))
        why = f"its attention heads have {found} dimensions, and vLLM computes {known} on CPUs; serve it on a GPU"
        raise ConfigError.of([Violation("model", why)])


def _head_dim(config: Mapping[str, Any]) -> int:
    """Dimensions of an attention head; 0 if the configuration does not tell."""
    return int(config.get("head_dim") or config.get("hidden_size", 0) // int(config.get("num_attention_heads") or 1))


def _cpu_kv_bytes(options: EngineOptions, files: ModelFiles | None, seqs: int) -> int:
    """Memory for the keys and values of `seqs` full sequences, within limits; at least two full sequences."""
    room = min(_CPU_KV_LIMIT, int(get_memory_node_info(get_visible_memory_node()[0]).available_memory) // 4)
    if files is None:
        return room
    config = files.text_config
    kv_heads = int(config.get("num_key_value_heads") or config.get("num_attention_heads", 1))
    head_dim = _head_dim(config)
    size = 4 if options.dtype == "float32" or _checkpoint_size(files) == 4 else 2
    per_token = 2 * int(config.get("num_hidden_layers", 0)) * kv_heads * max(head_dim, 32) * size
    if per_token == 0:
        return room
    length = options.max_model_len or int(config.get("max_position_embeddings", 4096))
    length += 2 * _CPU_BLOCK_SIZE - length % _CPU_BLOCK_SIZE
    return max(min(seqs * length * per_token, room), 2 * length * per_token)


def _checkpoint_size(files: ModelFiles) -> int:
    return max((_BYTES.get(info.dtype, 0) for info in files.tensors.values()), default=2)
