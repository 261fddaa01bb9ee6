"""Traces, sent to a real collector: one a GRPO step, over all services; none where none is configured."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from surogate.process import start_service
from surogate.rpc import health
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.telemetry import tracing
from surogate.v1 import job_pb2, job_pb2_grpc
from surogate.weights.push import push
from tests.helpers.collector import Collector, Span, collecting
from tests.helpers.grpo.grpo_job import grpo_job
from tests.helpers.rpc import serving
from tests.helpers.weight_images import make_image, replica

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="pip install 'surogate[otel]'")

TOY = "tests.helpers.toy_service"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_INSECURE", "true")
        assert tracing.configure("test")
        try:
            yield collector
        finally:
            tracing.shutdown()


async def sent(collector: Collector) -> list[Span]:
    """All spans, once tracing was turned off."""
    await asyncio.to_thread(tracing.shutdown)
    return collector.spans


@pytest.mark.parametrize("level", [0, 2])
async def test_a_grpo_step_is_one_trace_over_the_services(collector: Collector, tmp_path: Path, level: int) -> None:
    async with grpo_job(tmp_path, max_async_level=level) as (job, _):
        await job.run()
    spans = await sent(collector)
    roots = [span for span in spans if span.name == "step"]
    assert [root.attributes["step"] for root in roots] == [1, 2, 3, 4]
    assert len({root.trace for root in roots}) == 4
    for root in roots:
        assert not root.parent
        parts = [span for span in spans if span.trace == root.trace]
        names = [span.name for span in parts]
        assert [names.count(name) for name in ("generate", "score", "train", "push")] == [2, 2, 1, 1], names
        calls = {span.name: span for span in parts if span.name.startswith("surogate.v1.")}
        inside = {
            "surogate.v1.InferenceService/GenerateRollouts": "generate",
            "surogate.v1.RewardService/ScoreRollouts": "score",
            "surogate.v1.TrainerService/TrainStep": "train",
            "surogate.v1.TrainerService/PushWeights": "push",
        }
        for method, name in inside.items():
            assert calls[method].parent in {span.id for span in parts if span.name == name}, method


async def test_a_push_is_a_part_of_its_callers_trace(collector: Collector, tmp_path: Path) -> None:
    manifest = make_image(tmp_path / "image")
    with replica(tmp_path) as taking:
        async with serving(taking.register) as server:
            with tracing.span("push"):
                await push(tmp_path / "image", manifest, [server.address], ClientSecurity(), shared_memory=False)
    spans = await sent(collector)
    (own,) = [span for span in spans if span.name == "push"]
    methods = ("CreateWeightUpdate", "UploadWeights", "CommitWeightUpdate")
    names = {span.name for span in spans if span.trace == own.trace}
    assert {"commit", *(f"surogate.v1.WeightUpdateService/{method}" for method in methods)} <= names


async def test_a_service_sends_its_spans_under_its_name(tmp_path: Path) -> None:
    with collecting() as collector:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.address, "OTEL_RESOURCE_ATTRIBUTES": "team=blue"}
        service = await start_service(TOY, log_file=tmp_path / "log", environment=environment)
        try:
            async with open_channel(service.address, ClientSecurity()) as channel:
                await health.wait_serving(channel, "surogate.v1.JobService", timeout=60)
                await job_pb2_grpc.JobServiceStub(channel).GetJob(job_pb2.GetJobRequest(name="jobs/x"))
        finally:
            assert await service.stop() == 0
    assert [(span.service, span.name) for span in collector.spans] == [
        ("surogate-toy", "surogate.v1.JobService/GetJob")
    ], "and nothing of health checks"


async def test_a_collector_that_is_away_delays_nothing(tmp_path: Path) -> None:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    service = await start_service(TOY, log_file=tmp_path / "log", environment=environment)
    async with open_channel(service.address, ClientSecurity()) as channel:
        await job_pb2_grpc.JobServiceStub(channel).GetJob(job_pb2.GetJobRequest(name="jobs/x"), timeout=60)
    assert await service.stop(grace=30.0) == 0


def test_nothing_is_traced_unless_asked_for() -> None:
    assert not tracing.configure("x", {})
    assert not tracing.configure("x", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"})
    assert not tracing.configure("x", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"})
    with tracing.span("x", y=1):
        assert tracing.to_metadata() == ()
