"""Prometheus metrics of the trainer, beside those of every service and the steps' own."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from surogate.telemetry.metrics import BUCKETS, REGISTRY

PUSH_SECONDS = Histogram(
    "surogate_trainer_push_seconds",
    "Seconds of a push that was committed, from the first call to the last commit",
    buckets=BUCKETS,
    registry=REGISTRY,
)
PUSH_BYTES = Counter(
    "surogate_trainer_pushed_bytes", "Bytes of weights that replicas took, summed over them", registry=REGISTRY
)
PUSHES = Counter(
    "surogate_trainer_pushes",
    "Pushes to a replica by result: committed, failed",
    ("result",),
    registry=REGISTRY,
)
POLICY_VERSION = Gauge(
    "surogate_trainer_policy_version", "Last policy version that a replica committed", registry=REGISTRY
)
CHECKPOINT_SECONDS = Histogram(
    "surogate_trainer_checkpoint_seconds", "Seconds of writing a checkpoint", buckets=BUCKETS, registry=REGISTRY
)
CHECKPOINT_STEP = Gauge("surogate_trainer_checkpoint_step", "Step of the newest checkpoint", registry=REGISTRY)
