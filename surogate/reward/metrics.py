"""Prometheus metrics of a reward service, custom ones on this package included."""

from __future__ import annotations

import functools
from typing import NamedTuple

from prometheus_client import Counter, Gauge, Histogram

from surogate.telemetry.metrics import BUCKETS, REGISTRY

ROLLOUTS = Counter(
    "surogate_reward_rollouts",
    "Rollouts by environment and result: scored, failed",
    ("environment", "result"),
    registry=REGISTRY,
)
GROUP_SECONDS = Histogram(
    "surogate_reward_group_seconds",
    "Seconds of scoring a group, waiting included",
    ("environment",),
    buckets=BUCKETS,
    registry=REGISTRY,
)
GROUPS_IN_FLIGHT = Gauge("surogate_reward_in_flight_groups", "Groups being scored or waiting for it", registry=REGISTRY)
HUNG = Gauge("surogate_reward_hung_scorers", "Scorers that were given up and still run", registry=REGISTRY)


class Series(NamedTuple):
    """What is counted of one environment."""

    scored: Counter
    failed: Counter
    seconds: Histogram


@functools.cache  # looking a series up by its labels takes a lock and several microseconds, for each
def of_environment(environment: str) -> Series:
    """The series of an environment that the service has."""
    return Series(
        ROLLOUTS.labels(environment, "scored"),
        ROLLOUTS.labels(environment, "failed"),
        GROUP_SECONDS.labels(environment),
    )
