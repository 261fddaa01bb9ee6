"""Traces (OpenTelemetry): spans of a step over all services, sent to a collector where one is configured.

Off unless `OTEL_EXPORTER_OTLP_ENDPOINT` (or `…_TRACES_ENDPOINT`) names a collector; the other `OTEL_…` variables mean
what the OpenTelemetry specification says. Needs the extra `otel`. While it is off, functions here do next to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from surogate.telemetry.log import get_logger

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

Value = str | int | float | bool

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_FLUSH_SECONDS = 5.0
_log = get_logger("tracing")
_provider: TracerProvider | None = None
_tracer: Tracer | None = None


def configure(service: str, environ: Mapping[str, str] | None = None) -> bool:
    """Sends this process' spans as `surogate-SERVICE` (or `OTEL_SERVICE_NAME`), if the environment says where to.

    Returns whether it does. `shutdown` ends it.
    """
    global _provider, _tracer
    env = os.environ if environ is None else environ
    if not any(env.get(name) for name in _ENDPOINTS) or env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if env.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return False
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _log.warning("a collector of traces is configured, and the library is missing: pip install 'surogate[otel]'")
        return False
    name = env.get("OTEL_SERVICE_NAME") or f"surogate-{service}"
    _provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}), shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = _provider.get_tracer("surogate")
    return True


def shutdown() -> None:
    """Sends what is left, for a few seconds at the most, and turns tracing off."""
    global _provider, _tracer
    if _provider is not None:
        _provider.force_flush(int(_FLUSH_SECONDS * 1000))
        _provider.shutdown()
    _provider = _tracer = None


@contextmanager
def span(name: str, **attributes: Value) -> Iterator[None]:
    """A part of what is traced now; an exception is noted in it."""
    if _tracer is None:
        yield
        return
    with _tracer.start_as_current_span(name, attributes=attributes):
        yield


def server_span(method: str, metadata: Mapping[str, str]) -> AbstractContextManager[None]:
    """A call that is handled, `/package.Service/Method`, as a part of what its caller traces."""
    return nullcontext() if _tracer is None else _server_span(_tracer, method, metadata)


@contextmanager
def _server_span(tracer: Tracer, method: str, metadata: Mapping[str, str]) -> Iterator[None]:
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    service, _, name = method.lstrip("/").partition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
    parent = TraceContextTextMapPropagator().extract(metadata)
    with tracer.start_as_current_span(f"{service}/{name}", parent, SpanKind.SERVER, attributes):
        yield


def to_metadata() -> tuple[tuple[str, str], ...]:
    """What a call carries so that the server's span belongs to this one."""
    if _tracer is None:
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())


class Trace:
    """A trace of its own, whose parts are not made one inside the other: a step that is begun while another trains."""

    def __init__(self, name: str, **attributes: Value) -> None:
        self._root: Span | None = None
        if _tracer is not None:
            from opentelemetry.context import Context

            self._root = _tracer.start_span(name, Context(), attributes=attributes)

    @contextmanager
    def active(self) -> Iterator[None]:
        """What is done in the block belongs to the trace."""
        if self._root is None:
            yield
            return
        from opentelemetry.trace import use_span

        with use_span(self._root, end_on_exit=False, record_exception=False, set_status_on_exception=False):
            yield

    def end(self) -> None:
        """The trace is complete."""
        if self._root is not None:
            self._root.end()
