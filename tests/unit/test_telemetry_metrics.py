"""Metric names: documented, spelt for Prometheus, and shown over HTTP."""

from __future__ import annotations

import math
import urllib.request
from pathlib import Path

from prometheus_client import generate_latest

from surogate.telemetry import metrics

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def shown() -> str:
    return generate_latest(metrics.REGISTRY).decode()


def test_every_name_is_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert [name for name in metrics.VOCABULARY if f"`{name}`" not in text] == []


def test_constants_and_vocabulary_are_the_same_names() -> None:
    constants = {
        value
        for name, value in vars(metrics).items()
        if name.isupper() and not name.startswith("_") and isinstance(value, str)
    }
    assert constants == set(metrics.VOCABULARY)


def test_step_metrics_are_gauges_by_job_until_it_is_forgotten() -> None:
    metrics.publish({metrics.REWARD_MEAN: 0.5, "env/arithmetic/reward": 1.0, metrics.LOSS: math.nan}, job="a")
    assert 'surogate_reward_mean{job="a"} 0.5' in shown()
    assert 'surogate_env_arithmetic_reward{job="a"} 1.0' in shown()
    assert 'surogate_loss{job="a"}' not in shown()
    metrics.forget("a")
    assert 'job="a"' not in shown()


def test_metrics_are_served_over_http() -> None:
    server, port = metrics.serve("127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            assert b"process_resident_memory_bytes" in response.read()
    finally:
        server.shutdown()
        server.server_close()
