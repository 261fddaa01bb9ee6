"""Calls of the API server as the official client makes them, each holding its thread until it is done."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from orchestrator_svc.launchers.kubernetes.answers import ApiUnavailableError, answer_error, transport_error
from surogate.errors import ConfigError, SurogateError, Violation

_CHUNK = 1 << 16


def connect(kubeconfig: Path | None) -> Any:
    """The official client. Raises ConfigError, which names the setting, where it is missing or finds no cluster."""
    try:
        from kubernetes import client, config
        from kubernetes.dynamic import DynamicClient
    except ImportError as error:
        why = "kubernetes needs the Python client: pip install 'surogate[kubernetes]'"
        raise ConfigError.of([Violation("launcher", why)]) from error
    settings = client.Configuration()
    try:
        if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=settings)
        else:
            file = None if kubeconfig is None else str(kubeconfig)
            config.load_kube_config(config_file=file, client_configuration=settings)
    except config.ConfigException as error:
        why = f"there is no way to the cluster: {error}; run inside it, or set kubeconfig"
        raise ConfigError.of([Violation("kubeconfig", why)]) from error
    settings.retries = False  # calls are tried again here, where waiting holds no thread
    return DynamicClient(client.ApiClient(settings), discoverer=_NoDiscovery)


class _NoDiscovery:
    """Stands in for the client's discovery: the few kinds that are used here are known."""

    def __init__(self, client: Any, cache_file: Any) -> None:
        pass


def call(
    client: Any,
    method: str,
    path: str,
    body: dict[str, Any] | None,
    query: Sequence[tuple[str, str]],
    content: str,
    seconds: float,
) -> bytes:
    """One answer. Raises ApiUnavailableError when it is not all there in time, however steadily it trickles in."""
    until = time.monotonic() + seconds
    response = _send(client, method, path, body, query, content, seconds)
    parts = []
    try:
        while part := response.read1(_CHUNK):
            parts.append(part)
            if time.monotonic() > until:
                response.close()
                raise ApiUnavailableError(f"the API server's answer was not all there within {seconds:g} s")
    except SurogateError:
        raise
    except Exception as error:
        raise transport_error(error) from error
    response.release_conn()
    return b"".join(parts)


def open_stream(client: Any, path: str, query: Sequence[tuple[str, str]], seconds: float, silence: float) -> Any:
    """An answer without end: `seconds` to connect in, and at most `silence` between what comes."""
    return _send(client, "GET", path, None, query, "application/json", (seconds, silence))


def _send(
    client: Any,
    method: str,
    path: str,
    body: dict[str, Any] | None,
    query: Sequence[tuple[str, str]],
    content: str,
    seconds: float | tuple[float, float],
) -> Any:
    from kubernetes.client.exceptions import ApiException

    try:
        return client.request(
            method,
            path,
            body=body,
            query_params=list(query),
            content_type=content,
            serialize=False,
            _request_timeout=seconds,
        )
    except ApiException as error:
        raise answer_error(error) from error
    except Exception as error:
        raise transport_error(error) from error


def split_lines(response: Any) -> Iterator[bytes]:
    """The lines of a stream, as they come."""
    rest = b""
    try:
        for chunk in response.stream(_CHUNK):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line for line in lines if line)
    except Exception as error:
        raise transport_error(error) from error
    if rest:
        yield rest
