"""Metrics: the vocabulary of names, the Prometheus registry of the process, and the endpoint that shows it.

A name of the vocabulary (`reward/mean`) is the same in step metrics on the wire, in `metrics.jsonl`, in logs and on
the command line. In Prometheus names are `surogate_<component>_<what>_<unit>`; those of steps are gauges by job,
`surogate_step_reward_mean{job_id="…"}`. docs/metrics.md describes each.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

REWARD_MEAN = "reward/mean"
REWARD_STD = "reward/std"
RATIO_MEAN = "ratio/mean"
RATIO_MAX = "ratio/max"
MASKED_FRACTION = "masked/fraction"
MISMATCH_KL = "mismatch_kl"
REFERENCE_KL = "reference_kl"
CANARY_DIFF = "canary/max_abs_diff"
ENTROPY = "entropy"
COMPLETION_LENGTH = "completion/length"
COMPLETION_TRUNCATED_FRACTION = "completion/truncated_fraction"
TEMPERATURE = "temperature"
GROUPS_TRAINED = "groups/trained"
EPISODE_TURNS = "episode/turns"
GROUPS_ZERO_SIGNAL = "groups/zero_signal"
POLICY_LAG = "policy/lag"
POLICY_LAG_MAX = "policy/lag_max"
GRAD_NORM = "grad_norm"
LEARNING_RATE = "lr"
LOSS = "loss"
EPOCH = "epoch"
PACKING_EFFICIENCY = "packing/efficiency"
UPDATE_SKIPPED = "update/skipped"
PEAK_BYTES = "memory/peak_bytes"
MFU = "mfu"
GPU_BYTES = "gpu/memory_bytes"
GPU_UTILIZATION = "gpu/utilization"
GPU_WATTS = "gpu/power_watts"
GPU_CELSIUS = "gpu/temperature_celsius"
TOKENS_PER_SECOND = "tokens_per_second"
TOKENS_TRAINED = "tokens/trained"
STEP_PUSH_BYTES = "push/bytes"
STEP_PUSH_PAUSE = "push/pause"
TIME_GENERATE = "time/generate"
TIME_SCORE = "time/score"
TIME_TRAIN = "time/train"
TIME_PUSH = "time/push"
TIME_IDLE = "time/idle"
TIME_STEP = "time/step"


@dataclass(frozen=True)
class StepMetric:
    """What a metric of steps says, and in which unit; without one it is a pure number."""

    help: str
    unit: str = ""


VOCABULARY: Mapping[str, StepMetric] = {
    REWARD_MEAN: StepMetric("Mean reward of the step's rollouts"),
    REWARD_STD: StepMetric("Standard deviation of the rewards of the step's rollouts"),
    RATIO_MEAN: StepMetric("Mean importance ratio of trainer to sampler over trainable tokens"),
    RATIO_MAX: StepMetric("Largest importance ratio of trainer to sampler"),
    MASKED_FRACTION: StepMetric("Share of trainable tokens that a mask of the loss dropped, 0 to 1"),
    MISMATCH_KL: StepMetric("Mean of exp(l) - l - 1 over trainable tokens, l = trainer minus sampler logprob", "nats"),
    REFERENCE_KL: StepMetric("Mean divergence from the reference policy", "nats"),
    CANARY_DIFF: StepMetric("Largest difference of a replica's logprobs from the trainer's after a push", "nats"),
    ENTROPY: StepMetric("Mean entropy of the policy over trainable tokens", "nats"),
    COMPLETION_LENGTH: StepMetric("Mean completion length", "tokens"),
    COMPLETION_TRUNCATED_FRACTION: StepMetric("Share of completions that ended at the length limit, 0 to 1"),
    TEMPERATURE: StepMetric("Sampling temperature"),
    EPISODE_TURNS: StepMetric("Mean turns of the model in an episode, where environments answer its turns", "turns"),
    GROUPS_TRAINED: StepMetric("Groups that were trained on"),
    GROUPS_ZERO_SIGNAL: StepMetric("Groups dropped because all their advantages were zero"),
    POLICY_LAG: StepMetric("Mean optimiser steps between the policy that sampled and the one that trains", "steps"),
    POLICY_LAG_MAX: StepMetric("Most optimiser steps between the policy that sampled and the one that trains", "steps"),
    GRAD_NORM: StepMetric("Norm of the gradient before clipping"),
    LEARNING_RATE: StepMetric("Learning rate"),
    LOSS: StepMetric("Loss", "nats"),
    EPOCH: StepMetric("Passes over the data, as a fraction"),
    PACKING_EFFICIENCY: StepMetric("Share of the packed sequences that is not padding, 0 to 1"),
    UPDATE_SKIPPED: StepMetric("1 when the update was thrown away because its gradient was not finite"),
    PEAK_BYTES: StepMetric("Largest resident size of the training process so far", "bytes"),
    MFU: StepMetric("Operations that the step needed, of those its devices could have made, 0 to 1"),
    GPU_BYTES: StepMetric("Largest memory that training has taken of its GPU so far", "bytes"),
    GPU_UTILIZATION: StepMetric("Share of the last moment in which the GPU computed, 0 to 1"),
    GPU_WATTS: StepMetric("Power that the GPU draws", "watts"),
    GPU_CELSIUS: StepMetric("Temperature of the GPU", "celsius"),
    TOKENS_PER_SECOND: StepMetric("Tokens trained on per second of the step"),
    TOKENS_TRAINED: StepMetric("Completion tokens of the groups that were trained on"),
    STEP_PUSH_BYTES: StepMetric("Bytes of weights that each replica took", "bytes"),
    STEP_PUSH_PAUSE: StepMetric("Longest pause of a replica's generation for the push", "seconds"),
    TIME_GENERATE: StepMetric("Time of the step in which rollouts were generated", "seconds"),
    TIME_SCORE: StepMetric("Time of the step in which rollouts were scored", "seconds"),
    TIME_TRAIN: StepMetric("Time of the step in which the trainer trained", "seconds"),
    TIME_PUSH: StepMetric("Time of the step in which weights were pushed", "seconds"),
    TIME_IDLE: StepMetric("Time of the step in which the trainer waited", "seconds"),
    TIME_STEP: StepMetric("Time of the step", "seconds"),
}

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every counter that nobody reads
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
"""Upper bounds, in seconds, of everything that is timed."""

RPC_SECONDS = Histogram(
    "surogate_rpc_server_seconds",
    "Seconds that the server spent on a call",
    ("service", "method", "code"),
    buckets=BUCKETS,
    registry=REGISTRY,
)
RPC_IN_FLIGHT = Gauge(
    "surogate_rpc_server_in_flight_calls", "Calls being handled", ("service", "method"), registry=REGISTRY
)
RPC_SERVING = Gauge(
    "surogate_rpc_server_serving", "1 while the health service reports SERVING, else 0", ("service",), registry=REGISTRY
)

M = TypeVar("M", Counter, Gauge)
_by_job: list[Counter | Gauge] = []
_lock = threading.Lock()


def by_job(metric: M) -> M:
    """Registers a metric with the label `job_id`, whose series `forget` takes away."""
    _by_job.append(metric)
    return metric


def prometheus_name(name: str) -> str:
    """A step metric as Prometheus can spell it, with its unit: `time/train` is `surogate_step_time_train_seconds`."""
    spelt = re.sub(r"[^a-zA-Z0-9_]", "_", name)
    unit = VOCABULARY[name].unit
    return f"surogate_step_{spelt}" + (f"_{unit}" if unit and not spelt.endswith(unit) else "")


_STEPS = {
    name: by_job(Gauge(prometheus_name(name), metric.help, ("job_id",), registry=REGISTRY))
    for name, metric in VOCABULARY.items()
}
# One metric for the names that jobs make up (environments, parts of rewards, masks): theirs are labels.
_OTHER = by_job(
    Gauge("surogate_step_value", "Step metrics without a name of their own here", ("job_id", "name"), registry=REGISTRY)
)
_NUMBER = by_job(Gauge("surogate_step_number", "Optimiser steps done", ("job_id",), registry=REGISTRY))
_LAST = by_job(
    Gauge(
        "surogate_step_last_timestamp_seconds",
        "When the last step ended, or training began",
        ("job_id",),
        registry=REGISTRY,
    )
)


def begin(job: str) -> None:
    """Says that a job's training begins: from now on it has to make steps."""
    _LAST.labels(job).set(time.time())


def publish(values: Mapping[str, float], *, job: str, step: int) -> None:
    """Shows a step's metrics in Prometheus, each with the label `job_id`; names beside the vocabulary too."""
    with _lock:
        for name, value in values.items():
            if math.isfinite(value):
                (_STEPS[name].labels(job) if name in _STEPS else _OTHER.labels(job, name)).set(value)
        _NUMBER.labels(job).set(step)
        _LAST.labels(job).set(time.time())


def forget(job: str) -> None:
    """Takes an ended job's series out of the registry."""
    with _lock:
        for metric in _by_job:
            metric.remove_by_labels({"job_id": job})


def serve(host: str, port: int) -> tuple[WSGIServer, int]:
    """Starts the HTTP endpoint in a thread; returns it and its port. Raises OSError if the port is taken."""
    server, _ = start_http_server(port, host, registry=REGISTRY)
    return server, int(server.server_port)
