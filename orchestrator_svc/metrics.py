"""Prometheus metrics of the orchestrator, beside those of every service and the steps' own."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from surogate.telemetry.metrics import REGISTRY

JOBS = Gauge("surogate_jobs", "Jobs in the store that have not ended, by state", ("state",), registry=REGISTRY)
JOB_ENDS = Counter("surogate_job_ends", "Jobs that ended here, by kind and state", ("kind", "state"), registry=REGISTRY)
WORKER_RESTARTS = Counter(
    "surogate_worker_restarts", "Workers that died and were started again", ("component",), registry=REGISTRY
)
