"""Client channels: TLS, bearer token, default deadlines, retries, and errors as domain exceptions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from types import TracebackType
from typing import Any

import grpc

from surogate.config.service import MIB
from surogate.errors import DataLossError
from surogate.rpc import address
from surogate.rpc.context import to_metadata
from surogate.rpc.deadlines import Deadlines, deadline_of
from surogate.rpc.renewing import RenewingChannel
from surogate.rpc.security import ClientSecurity, authorization
from surogate.rpc.status import from_rpc_error
from surogate.telemetry import tracing
from surogate.telemetry.log import get_logger

__all__ = ["ClientSecurity", "open_blocking_channel", "open_channel"]

_log = get_logger("rpc")
_warned: set[str] = set()
_CONNECT_SECONDS = 10
"""Time that a connection may take to be made, TLS included: what gRPC calls the least pause before the next attempt
bounds the attempt itself, and a busy machine or a far one needs longer than a moment."""
_MANY = ("dns:", "ipv4:", "ipv6:")
"""Targets that stand for several servers."""


def open_channel(
    target: str,
    security: ClientSecurity | None = None,
    *,
    idempotent: Sequence[str] = (),
    deadlines: Deadlines | None = None,
    default_deadline: float = 60.0,
    max_message_bytes: int = 64 * MIB,
) -> grpc.aio.Channel:
    """Opens a channel to `target` (HOST:PORT, or any gRPC target). Failed calls raise `SurogateError`s.

    Calls to `dns:///HOST:PORT` go round all the addresses of the name, as a headless Service has them, and calls to
    `ipv4:HOST:PORT,HOST:PORT` round those.

    `idempotent` lists methods (`surogate.v1.JobService/GetJob`) or whole services (`surogate.v1.RewardService`) that
    are retried on UNAVAILABLE, up to 5 attempts with exponential back-off. Calls without a timeout get the default of
    their method: `deadlines` by short name, else the contract's, else `default_deadline` seconds. Security is
    `from_env()` where not given. Raises ConfigError for TLS files that cannot be
    read, InvalidInputError for a target that is none.
    """
    address.check_target(target)
    security = security or ClientSecurity.from_env()
    options = _channel_options(
        security, idempotent=idempotent, max_message_bytes=max_message_bytes, balanced=target.startswith(_MANY)
    )
    if not security.uses_tls:
        _warn_if_exposed(target, security)

    def connect() -> grpc.aio.Channel:
        if security.uses_tls:
            return grpc.aio.secure_channel(target, security.credentials(), options=options)
        return grpc.aio.insecure_channel(target, options=options)

    return _Channel(RenewingChannel(connect, security), _CallDefaults(security, deadlines or {}, default_deadline))


def open_blocking_channel(target: str, security: ClientSecurity) -> grpc.Channel:
    """A channel of gRPC's threaded interface with a connection of its own, for bulk data: calls get no defaults, no
    token, and raise grpc.RpcError."""
    options = [*_channel_options(security), ("grpc.use_local_subchannel_pool", 1)]
    if security.uses_tls:
        return grpc.secure_channel(target, security.credentials(), options=options)
    return grpc.insecure_channel(target, options=options)


def _channel_options(
    security: ClientSecurity,
    *,
    idempotent: Sequence[str] = (),
    max_message_bytes: int = 64 * MIB,
    balanced: bool = False,
) -> list[tuple[str, int | str]]:
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", _CONNECT_SECONDS * 1000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.service_config", json.dumps(_service_config(idempotent, balanced))),
    ]
    if security.server_name:
        options.append(("grpc.ssl_target_name_override", security.server_name))
    return options


def _service_config(idempotent: Sequence[str], balanced: bool) -> dict[str, Any]:
    balancing: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]} if balanced else {}
    if not idempotent:
        return balancing
    names = [_method_name(method) for method in idempotent]
    policy = {
        "maxAttempts": 5,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2.5,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return balancing | {"methodConfig": [{"name": names, "retryPolicy": policy}]}


def _method_name(method: str) -> dict[str, str]:
    service, _, name = method.lstrip("/").partition("/")
    return {"service": service, "method": name} if name else {"service": service}


def _warn_if_exposed(target: str, security: ClientSecurity) -> None:
    if security.has_token and not address.is_loopback(target) and target not in _warned:
        _warned.add(target)
        _log.warning("the bearer token travels unencrypted to another host; set SUROGATE_TLS_CA", target=target)


class _CallDefaults:
    """What is added to every call: the deadline where none is given, the token, and the log context."""

    def __init__(self, security: ClientSecurity, deadlines: Deadlines, default_deadline: float) -> None:
        self._token = security.token_source()
        self._deadlines = deadlines
        self._default_deadline = default_deadline

    def timeout(self, method: str) -> float | None:
        return deadline_of(method, self._deadlines, self._default_deadline)

    def metadata(self, given: Any) -> tuple[tuple[str, str | bytes], ...]:
        return (*(given or ()), *authorization(self._token()), *to_metadata(), *tracing.to_metadata())


class _Channel(grpc.aio.Channel):
    """A channel whose calls have the defaults and raise domain exceptions."""

    def __init__(self, renewing: RenewingChannel, defaults: _CallDefaults) -> None:
        self._renewing = renewing
        self._defaults = defaults

    async def __aenter__(self) -> _Channel:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._renewing.close(None)

    async def close(self, grace: float | None = None) -> None:
        await self._renewing.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._renewing.current.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._renewing.current.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._renewing.current.channel_ready()

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._wrap("unary_unary", method, args, kwargs)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._wrap("unary_stream", method, args, kwargs)

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._wrap("stream_unary", method, args, kwargs)

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._wrap("stream_stream", method, args, kwargs)

    def _wrap(self, kind: str, method: str, args: Any, kwargs: Any) -> Callable[..., _Call]:
        channel = self._renewing.current
        inner = getattr(channel, kind)(method, *args, **kwargs)

        def call(request: Any = None, *, timeout: float | None = None, metadata: Any = None, **options: Any) -> _Call:
            nonlocal channel, inner
            if channel is not (current := self._renewing.current):
                channel, inner = current, getattr(current, kind)(method, *args, **kwargs)
            seconds = self._defaults.timeout(method) if timeout is None else timeout
            return _Call(inner(request, timeout=seconds, metadata=self._defaults.metadata(metadata), **options))

        return call


class _Call:
    """A call of any of the four kinds, whose errors are domain exceptions; the rest is gRPC's call object."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __await__(self) -> Generator[Any, None, Any]:
        try:
            return _whole((yield from self._inner.__await__()))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for response in self._inner:
                yield _whole(response)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def read(self) -> Any:
        try:
            return _whole(await self._inner.read())
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def write(self, request: Any) -> None:
        try:
            await self._inner.write(request)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def done_writing(self) -> None:
        try:
            await self._inner.done_writing()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error


def _whole(message: Any) -> Any:
    """The message of an answer: gRPC logs one that it cannot read, and gives None in its place."""
    if message is None:
        raise DataLossError(
            "the answer cannot be read: it is not of the type that the contract says, or nested too deeply",
            reason="UNREADABLE_ANSWER",
        )
    return message
