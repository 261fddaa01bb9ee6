"""Variables that vLLM reads when it is imported, and that its processes inherit."""

from __future__ import annotations

import os

from inference_svc.plugin import ENGINE_LOG
from inference_svc.settings import InferenceSettings


def prepare(settings: InferenceSettings) -> None:
    """Sets them, before vLLM is imported; what the user set already is kept."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        # Logs go our way: in this process through structlog's handler, in the engine's by the plugin.
        "VLLM_CONFIGURE_LOGGING": "0",
        # Replicas and the trainer may share few cores: threads pinned to the same core would be the worst of choices.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # The trainer computes at the same time: threads that spin while they wait would take its cores, and it ours.
        "OMP_WAIT_POLICY": "PASSIVE",
        ENGINE_LOG: f"{settings.log_format} {settings.log_level}",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
