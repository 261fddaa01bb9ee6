"""Prometheus metrics of the receiving end of a weight push."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

from surogate.telemetry.metrics import BUCKETS, REGISTRY

UPDATE_SECONDS = Histogram(
    "surogate_weights_update_seconds",
    "Seconds of each phase of a weight update: upload, verify, commit, pause",
    ("phase",),
    buckets=BUCKETS,
    registry=REGISTRY,
)
RECEIVED_BYTES = Counter("surogate_weights_received_bytes", "Bytes of weights that came over gRPC", registry=REGISTRY)
