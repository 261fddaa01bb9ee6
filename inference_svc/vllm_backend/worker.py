"""What is added to vLLM's workers: scoring of prompts at a temperature, and seeds that last on CPU.

vLLM gives prompt logprobs of the raw distribution whatever the request's temperature. Sampler logprobs are those at the
temperature, so scores that are to be compared with them must be too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from vllm.platforms import current_platform

from inference_svc.vllm_backend.fused_adapter import fused_layers
from inference_svc.vllm_backend.generators import spare_discarded

_Compute = Callable[[torch.Tensor, dict[str, int]], dict[str, Any]]


class WorkerExtension:
    """Mixed into vLLM's worker class (`worker_extension_cls`); called by `collective_rpc`."""

    model_runner: Any

    def install_generators(self) -> None:
        """Makes seeded requests survive on CPU that their prompt is computed over several steps."""
        if current_platform.is_cpu():
            spare_discarded(self.model_runner)

    def fused_layers(self) -> dict[str, list[tuple[str, int]]]:
        """See `fused_adapter.fused_layers`; nothing without adapters."""
        adapters = getattr(self.model_runner, "lora_manager", None)
        return fused_layers(adapters._adapter_manager) if adapters is not None else {}

    def install_scoring(self) -> bool:
        """Makes prompt logprobs follow each request's temperature; False where the model runner has no place for it."""
        runner = self.model_runner
        if not (hasattr(runner, "_get_prompt_logprobs_dict") and hasattr(runner, "num_prompt_logprobs")):
            return False
        runner._get_prompt_logprobs_dict = _by_temperature(runner, runner._get_prompt_logprobs_dict)
        return True


def _by_temperature(runner: Any, compute: _Compute) -> _Compute:
    """`compute` once for each temperature among the requests of a batch, its logits divided by it."""

    def compute_all(hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        wanted: dict[str, int] = runner.num_prompt_logprobs
        if not wanted:
            return {}
        groups: dict[float, dict[str, int]] = defaultdict(dict)
        for request_id, count in wanted.items():
            groups[runner.requests[request_id].sampling_params.temperature or 1.0][request_id] = count
        found: dict[str, Any] = {}
        log_softmax = runner.sampler.compute_logprobs
        try:
            for temperature, group in groups.items():
                runner.num_prompt_logprobs = group
                runner.sampler.compute_logprobs = _scaled(log_softmax, temperature)
                found.update(compute(hidden_states, num_scheduled_tokens))
        finally:
            runner.sampler.compute_logprobs = log_softmax
            runner.num_prompt_logprobs = wanted
        for request_id in found:
            wanted.pop(request_id, None)
        return found

    return compute_all


def _scaled(log_softmax: Callable[[torch.Tensor], torch.Tensor], temperature: float) -> Any:
    return lambda logits: log_softmax(logits.float() / temperature)
