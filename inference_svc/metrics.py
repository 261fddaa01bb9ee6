"""Prometheus metrics of the inference service."""

from __future__ import annotations

from collections.abc import Iterable

import prometheus_client
from prometheus_client import Counter, Gauge, Metric
from prometheus_client.registry import Collector

from surogate.telemetry.metrics import REGISTRY

REQUESTS = Counter("surogate_inference_requests", "Calls by kind and result", ("kind", "result"), registry=REGISTRY)
PROMPT_TOKENS = Counter("surogate_inference_prompt_tokens", "Prompt tokens of finished calls", registry=REGISTRY)
CACHED_TOKENS = Counter(
    "surogate_inference_cached_prompt_tokens", "Prompt tokens whose keys and values were cached", registry=REGISTRY
)
GENERATED_TOKENS = Counter("surogate_inference_generated_tokens", "Tokens generated", registry=REGISTRY)
IN_FLIGHT = Gauge("surogate_inference_admitted_sequences", "Sequences admitted and not ended", registry=REGISTRY)
QUEUE_LENGTH = Gauge("surogate_inference_waiting_sequences", "Sequences waiting for their turn", registry=REGISTRY)
POLICY_VERSION = Gauge("surogate_inference_policy_version", "Version of the weights that serve", registry=REGISTRY)


class _Engine(Collector):
    """vLLM's own metrics (`vllm:num_requests_waiting`, …), which it keeps in the default registry."""

    def collect(self) -> Iterable[Metric]:
        return [metric for metric in prometheus_client.REGISTRY.collect() if metric.name.startswith("vllm:")]

    def describe(self) -> Iterable[Metric]:
        return ()


REGISTRY.register(_Engine())
