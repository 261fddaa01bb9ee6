"""Metrics: the vocabulary of names, the Prometheus registry of the process, and the endpoint that shows it.

A name of the vocabulary (`reward/mean`) is the same in step metrics on the wire, in `metrics.jsonl`, in logs and on
the command line; in Prometheus it is a gauge `surogate_reward_mean`. docs/metrics.md describes each.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

REWARD_MEAN = "reward/mean"
REWARD_STD = "reward/std"
RATIO_MEAN = "ratio/mean"
RATIO_MAX = "ratio/max"
MASKED_FRACTION = "masked/fraction"
MISMATCH_KL = "mismatch_kl"
ENTROPY = "entropy"
COMPLETION_LENGTH = "completion/length"
COMPLETION_TRUNCATED_FRACTION = "completion/truncated_fraction"
GROUPS_ZERO_SIGNAL = "groups/zero_signal"
POLICY_LAG = "policy/lag"
GRAD_NORM = "grad_norm"
LEARNING_RATE = "lr"
LOSS = "loss"
TOKENS_PER_SECOND = "tokens_per_second"
TIME_GENERATE = "time/generate"
TIME_SCORE = "time/score"
TIME_TRAIN = "time/train"
TIME_PUSH = "time/push"
TIME_IDLE = "time/idle"
TIME_STEP = "time/step"

VOCABULARY: Mapping[str, str] = {
    REWARD_MEAN: "Mean reward of the step's rollouts",
    REWARD_STD: "Standard deviation of the rewards of the step's rollouts",
    RATIO_MEAN: "Mean importance ratio of trainer to sampler over trainable tokens",
    RATIO_MAX: "Largest importance ratio of trainer to sampler",
    MASKED_FRACTION: "Share of trainable tokens that a mask of the loss dropped",
    MISMATCH_KL: "Mean of exp(l) - l - 1 over trainable tokens, l = trainer minus sampler logprob",
    ENTROPY: "Mean entropy of the policy over trainable tokens, in nats",
    COMPLETION_LENGTH: "Mean completion length, in tokens",
    COMPLETION_TRUNCATED_FRACTION: "Share of completions that ended at the length limit",
    GROUPS_ZERO_SIGNAL: "Groups dropped because all their advantages were zero",
    POLICY_LAG: "Mean optimiser steps between the policy that sampled and the one that trains",
    GRAD_NORM: "Norm of the gradient before clipping",
    LEARNING_RATE: "Learning rate of the step",
    LOSS: "Loss of the step",
    TOKENS_PER_SECOND: "Tokens trained on per second of the step",
    TIME_GENERATE: "Seconds of the step in which rollouts were generated",
    TIME_SCORE: "Seconds of the step in which rollouts were scored",
    TIME_TRAIN: "Seconds of the step in which the trainer trained",
    TIME_PUSH: "Seconds of the step in which weights were pushed",
    TIME_IDLE: "Seconds of the step in which the trainer waited",
    TIME_STEP: "Seconds of the step",
}

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
RPC_SECONDS = Histogram(
    "surogate_rpc_seconds",
    "Seconds that the server spent on a call",
    ("service", "method", "code"),
    buckets=_SECONDS,
    registry=REGISTRY,
)
RPC_IN_FLIGHT = Gauge("surogate_rpc_in_flight", "Calls being handled", ("service", "method"), registry=REGISTRY)
PUSH_SECONDS = Histogram(
    "surogate_weight_update_seconds",
    "Seconds of each phase of a weight update: upload, verify, commit, pause",
    ("phase",),
    buckets=_SECONDS,
    registry=REGISTRY,
)
PUSH_BYTES = Counter("surogate_weight_update_bytes", "Bytes of weights received", registry=REGISTRY)

_gauges: dict[str, Gauge] = {}
_lock = threading.Lock()


def publish(values: Mapping[str, float], *, job: str) -> None:
    """Shows a step's metrics in Prometheus, a gauge each with the label `job`; names beside the vocabulary too."""
    for name, value in values.items():
        if math.isfinite(value):
            _gauge(name).labels(job).set(value)


def forget(job: str) -> None:
    """Takes an ended job's gauges out of the registry."""
    with _lock:
        for gauge in _gauges.values():
            with suppress(KeyError):  # a job need not have reported every metric
                gauge.remove(job)


def prometheus_name(name: str) -> str:
    """`reward/mean` as Prometheus can spell it: `surogate_reward_mean`."""
    return "surogate_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)


def serve(host: str, port: int) -> tuple[WSGIServer, int]:
    """Starts the HTTP endpoint in a thread; returns it and its port. Raises OSError if the port is taken."""
    server, _ = start_http_server(port, host, registry=REGISTRY)
    return server, int(server.server_port)


def _gauge(name: str) -> Gauge:
    with _lock:
        if name not in _gauges:
            text = VOCABULARY.get(name, f"Step metric {name}")
            _gauges[name] = Gauge(prometheus_name(name), text, ("job",), registry=REGISTRY)
        return _gauges[name]
