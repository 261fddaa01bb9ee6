"""The gRPC server that all four services use."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from surogate.config.service import ServiceSettings
from surogate.errors import ConfigError, InvalidInputError, Violation
from surogate.rpc import address, auth, health
from surogate.rpc.deadlines import Deadlines
from surogate.rpc.guard import CallGuard, ServerContext
from surogate.telemetry.log import get_logger

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_log = get_logger("rpc")


class RpcServer:
    """A grpc.aio server with health, reflection, TLS, tokens, limits and deadlines by `settings`.

    Servicers are plain async classes that raise `SurogateError`s. Add them all, then `start`.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self._health = health.HealthServicer()
        self._guard = CallGuard(
            auth.TokenSource(settings.token_file, settings.token_env),
            settings.max_concurrent_rpcs,
            settings.default_deadline,
        )
        self._server = grpc.aio.server(interceptors=[_Interceptor(self._guard)], options=_options(settings))
        self._health_server: grpc.aio.Server | None = None
        self._names: list[str] = []
        self._failure: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self.address = ""
        """Where the server is reached from its own host, HOST:PORT; empty before `start`."""
        self.health_address = ""
        """The same of the server that has the health service alone; empty without one."""

    def add(
        self,
        add_fn: Callable[[Any, grpc.aio.Server], object],
        servicer: object,
        name: str,
        *,
        serving: bool = True,
        deadlines: Deadlines | None = None,
    ) -> None:
        """Registers `servicer` by the generated `add_XServicer_to_server` as `name`, in full: `surogate.v1.JobService`.

        `serving=False` reports NOT_SERVING until `set_serving` says otherwise. `deadlines` overrides the default
        deadlines of methods, by short name, in seconds; None for a stream that lives as long as its subject.
        """
        add_fn(servicer, self._server)
        self._names.append(name)
        self._health.set(name, serving)
        self._guard.deadlines.update({f"/{name}/{method}": value for method, value in (deadlines or {}).items()})

    def set_serving(self, name: str, serving: bool) -> None:
        """Changes what the health service reports for a service."""
        self._health.set(name, serving)

    def fail(self, error: Exception) -> None:
        """Says that the process cannot go on: `run_service` drains and exits with 1. The first error counts."""
        if not self._failure.done():
            self._failure.set_result(error)

    async def failed(self) -> Exception:
        """Waits for `fail` and returns its error."""
        return await asyncio.shield(self._failure)

    async def start(self) -> int:
        """Binds and serves; returns the port. Raises ConfigError when the address or the TLS files cannot be used."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*self._names, health.SERVICE, reflection.SERVICE_NAME], self._server)
        port = self._bind()
        if self._settings.health_listen:
            await self._serve_health(self._settings.health_listen)
        await self._server.start()
        self.address = address.reachable(self._settings.listen, port)
        self._warn_if_open()
        return port

    async def drain(self, grace: float) -> None:
        """Reports NOT_SERVING, then stops as `stop` does."""
        self._health.drain()
        await asyncio.sleep(self._settings.drain_delay if grace > 0 else 0)
        await self.stop(grace)

    async def stop(self, grace: float = 0.0) -> None:
        """Refuses new calls, gives those in flight `grace` seconds to finish, and cancels the rest."""
        self._health.drain()
        self._guard.drain()
        await self._server.stop(grace)
        if self._health_server is not None:
            await self._health_server.stop(None)

    async def _serve_health(self, listen: str) -> None:
        server = grpc.aio.server(interceptors=[_Interceptor(self._guard)], options=_options(self._settings))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        with _told_of("health_listen", listen):
            port = server.add_insecure_port(listen)
        await server.start()
        self._health_server = server
        self.health_address = address.reachable(listen, port)

    def _bind(self) -> int:
        listen = self._settings.listen
        with _told_of("listen", listen):
            if self._settings.tls_cert and self._settings.tls_key:
                credentials = auth.server_credentials(
                    self._settings.tls_cert, self._settings.tls_key, self._settings.tls_client_ca
                )
                return self._server.add_secure_port(listen, credentials)
            return self._server.add_insecure_port(listen)

    def _warn_if_open(self) -> None:
        settings = self._settings
        known_clients = settings.token_file or settings.token_env or settings.tls_client_ca
        if not known_clients and not address.is_loopback(settings.listen):
            _log.warning(
                "whoever reaches this address may use this service: set token_file, token_env or tls_client_ca"
            )


@contextmanager
def _told_of(setting: str, listen: str) -> Iterator[None]:
    """Turns gRPC's error on an address that cannot be used into one that names the setting."""
    try:
        yield
    except RuntimeError as error:
        why = "is the port taken, or the host not one of this machine's?"
        raise ConfigError.of([Violation(setting, f"cannot listen on {listen}: {why}")]) from error


def _options(settings: ServiceSettings) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.so_reuseport", 0),  # else a second server on a taken port gets a share of its calls
        # Clients ping every 30 s, also between calls (channel.py); allow that, and ping back to find dead ones.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if settings.max_connection_age is not None:
        options.append(("grpc.max_connection_age_ms", int(settings.max_connection_age * 1000)))
    return options


class _Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # no type parameters at run time
    """Puts the guard around every handler."""

    def __init__(self, guard: CallGuard) -> None:
        self._guard = guard
        self._handlers: dict[str, _Handler] = {}
        """By method, of those that there are: handlers are added before the server starts, and never changed."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        method = str(handler_call_details.method)
        if method in self._handlers:
            return self._handlers[method]
        handler = await continuation(handler_call_details)
        if handler is not None:
            handler = self._handlers[method] = _guarded(handler, method, self._guard)
        return handler


class _Malformed:
    """Stands in for a request whose bytes are not a message of its type, until the guard can say so."""


def _guarded(handler: Any, method: str, guard: CallGuard) -> _Handler:
    behaviour = next(
        found
        for found in (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
        if found is not None
    )
    requests = _stream_checked if handler.request_streaming else _checked

    async def answer_once(request: Any, context: ServerContext) -> Any:
        async with guard.around(method, context):
            return await behaviour(requests(request), context)

    async def answer_stream(request: Any, context: ServerContext) -> None:
        # Responses are written here, not yielded, so that a deadline that passes during a write is met by the guard.
        async with guard.around(method, context):
            if not inspect.isasyncgenfunction(behaviour):
                await behaviour(requests(request), context)
                return
            async with aclosing(behaviour(requests(request), context)) as responses:
                async for response in responses:
                    await context.write(response)

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(
        answer_stream if handler.response_streaming else answer_once,
        request_deserializer=_tolerant(handler.request_deserializer),
        response_serializer=handler.response_serializer,
    )


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Malformed()

    return parse


def _checked(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise InvalidInputError("the request's bytes are not a message of this method's type", reason="MALFORMED")
    return request


async def _stream_checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)
