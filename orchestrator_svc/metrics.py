"""Prometheus metrics of the orchestrator, beside those of every service and the steps' own."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from surogate.telemetry.metrics import BUCKETS, REGISTRY, by_job

JOBS = Gauge(
    "surogate_orchestrator_jobs", "Jobs in the store that have not ended, by state", ("state",), registry=REGISTRY
)
JOB_ENDS = Counter(
    "surogate_orchestrator_job_ends", "Jobs that ended here, by kind and state", ("kind", "state"), registry=REGISTRY
)
WORKER_RESTARTS = Counter(
    "surogate_orchestrator_worker_restarts",
    "Workers that died and were started again",
    ("component",),
    registry=REGISTRY,
)
STORE_SECONDS = Histogram(
    "surogate_orchestrator_store_seconds",
    "Seconds of a transaction of the job store, by access (read, write) and result (ok, unavailable, error)",
    ("access", "result"),
    buckets=BUCKETS,
    registry=REGISTRY,
)
GROUPS = by_job(
    Counter(
        "surogate_orchestrator_groups",
        "Groups of rollouts by what became of them: trained, or the cause for which they were dropped",
        ("job_id", "outcome"),
        registry=REGISTRY,
    )
)
ROLLOUTS = by_job(
    Counter("surogate_orchestrator_rollouts", "Rollouts that were trained on", ("job_id",), registry=REGISTRY)
)
REPLICA_LAG = by_job(
    Gauge(
        "surogate_orchestrator_replica_lag_versions",
        "Policy versions by which a replica's weights are behind the trainer's, as of the last step",
        ("job_id", "replica"),
        registry=REGISTRY,
    )
)
