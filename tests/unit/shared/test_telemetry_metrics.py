"""Metric names: documented, spelt for Prometheus, and shown over HTTP."""

from __future__ import annotations

import math
import urllib.request
from pathlib import Path

from prometheus_client import generate_latest

from surogate.telemetry import metrics

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


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


def test_names_end_with_their_unit_once() -> None:
    assert metrics.prometheus_name(metrics.TIME_TRAIN) == "surogate_step_time_train_seconds"
    assert metrics.prometheus_name(metrics.PEAK_BYTES) == "surogate_step_memory_peak_bytes"
    assert metrics.prometheus_name(metrics.REWARD_MEAN) == "surogate_step_reward_mean"


def test_step_metrics_are_gauges_by_job_until_it_is_forgotten() -> None:
    values = {metrics.REWARD_MEAN: 0.5, "env/arithmetic/reward": 1.0, metrics.LOSS: math.nan}
    metrics.begin("a")
    metrics.publish(values, job="a", step=3)
    assert 'surogate_step_reward_mean{job_id="a"} 0.5' in shown()
    assert 'surogate_step_value{job_id="a",name="env/arithmetic/reward"} 1.0' in shown()
    assert 'surogate_step_number{job_id="a"} 3.0' in shown()
    assert 'surogate_step_last_timestamp_seconds{job_id="a"}' in shown()
    assert 'surogate_step_loss_nats{job_id="a"}' not in shown()
    metrics.forget("a")
    assert 'job_id="a"' not in shown()


def test_metrics_are_served_over_http() -> None:
    server, port = metrics.serve("127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            assert b"process_resident_memory_bytes" in response.read()
    finally:
        server.shutdown()
        server.server_close()
