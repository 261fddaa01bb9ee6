"""What happens around every call that a server handles, whatever its kind: authentication, the concurrency limit, the
default deadline, metrics, log context, and the translation of exceptions to rich statuses."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from typing import Any, TypeAlias

import grpc
from prometheus_client import Gauge, Histogram

from surogate import errors
from surogate.rpc.auth import TokenSource, check_token
from surogate.rpc.caller import calling
from surogate.rpc.context import bound_from_metadata
from surogate.rpc.deadlines import deadline_of
from surogate.rpc.status import code_of, fitted, to_status, trailing_metadata
from surogate.telemetry import metrics, tracing
from surogate.telemetry.log import get_logger

ServerContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_OPEN = "/grpc.health.v1.Health/"
_log = get_logger("rpc")


class CallGuard:
    """`async with guard.around(method, context)` is the whole of the server's policy for one call.

    `deadlines` are those that services gave when they were added, by full method name; all are in seconds.
    """

    def __init__(self, tokens: TokenSource, max_concurrent: int, default_deadline: float) -> None:
        self.deadlines: dict[str, float | None] = {}
        self._tokens = tokens
        self._max_concurrent = max_concurrent
        self._max_followed = max(1, max_concurrent * 3 // 4)
        self._default_deadline = default_deadline
        self._in_flight = 0
        self._followed = 0
        self._draining = False
        self._endless: set[asyncio.Timeout] = set()

    def drain(self) -> None:
        """Ends, with UNAVAILABLE, the calls that would never end by themselves; they may be made elsewhere."""
        self._draining = True
        now = asyncio.get_running_loop().time()
        for timeout in self._endless:
            timeout.reschedule(now)

    @asynccontextmanager
    async def around(self, method: str, context: ServerContext) -> AsyncIterator[None]:
        """Runs its body as the call `method` (`/package.Service/Method`). What the body raises ends the call."""
        code = grpc.StatusCode.OK
        start = time.perf_counter()
        in_flight = _in_flight(method)
        in_flight.inc()
        try:
            with self._admitted(method, _metadata(context)):
                async with self._deadline(method, context):
                    yield
        except grpc.aio.AbortError:
            code = grpc.StatusCode.UNKNOWN  # the servicer chose a status by itself
            raise
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:  # noqa: BLE001 - the boundary: whatever it is, the caller gets a status
            code = code_of(error)
            await _abort(context, method, error)
        finally:
            in_flight.dec()
            _seconds(method, code.name).observe(time.perf_counter() - start)

    @contextmanager
    def _admitted(self, method: str, metadata: Mapping[str, str]) -> Iterator[None]:
        """A call of somebody who may make it, in its place among the calls at once; health is everybody's."""
        if method.startswith(_OPEN):
            yield
            return
        name = check_token(metadata.get("authorization"), self._tokens.tokens())
        with calling(name), bound_from_metadata(metadata), tracing.server_span(method, metadata):
            endless = self._default(method) is None
            self._take_slot(endless)
            try:
                yield
            finally:
                self._in_flight -= 1
                self._followed -= endless

    def _take_slot(self, endless: bool) -> None:
        """Takes a place among the calls at once. Those that never end by themselves leave some for the others: whoever
        watches must not keep out who wants to cancel."""
        if self._in_flight >= self._max_concurrent:
            raise errors.BusyError(f"{self._max_concurrent} calls are being handled already; try again")
        if endless and self._followed >= self._max_followed:
            raise errors.BusyError(
                f"{self._max_followed} streams are being followed already (3 of 4 of max_concurrent_rpcs, which is "
                f"{self._max_concurrent}): end some, or try again"
            )
        self._in_flight += 1
        self._followed += endless

    def _deadline(self, method: str, context: ServerContext) -> AbstractAsyncContextManager[None]:
        default = self._default(method)
        if default is not None and context.time_remaining() is not None:
            return nullcontext()  # gRPC itself ends the call when the caller's own deadline passes
        return self._limited(default)

    @asynccontextmanager
    async def _limited(self, default: float | None) -> AsyncIterator[None]:
        """The method's default deadline; without one, the end of the server's draining."""
        try:
            async with asyncio.timeout(default) as timeout:
                if default is None:
                    self._endless.add(timeout)
                    if self._draining:
                        timeout.reschedule(asyncio.get_running_loop().time())
                yield
        except TimeoutError as error:
            if not timeout.expired():
                raise
            if default is None:
                raise errors.UnavailableError("this server is shutting down; try again", reason="DRAINING") from error
            raise errors.DeadlineError(
                f"the call had no deadline and took longer than the default of {default:g} s; give it one"
            ) from error
        finally:
            self._endless.discard(timeout)

    def _default(self, method: str) -> float | None:
        if method in self.deadlines:
            return self.deadlines[method]
        return deadline_of(method, {}, self._default_deadline)


@functools.cache  # looking a series up by its labels takes a lock and several microseconds
def _in_flight(method: str) -> Gauge:
    service, _, name = method.lstrip("/").partition("/")
    return metrics.RPC_IN_FLIGHT.labels(service, name)


@functools.cache
def _seconds(method: str, code: str) -> Histogram:
    service, _, name = method.lstrip("/").partition("/")
    return metrics.RPC_SECONDS.labels(service, name, code)


def _metadata(context: ServerContext) -> Mapping[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


async def _abort(context: ServerContext, method: str, error: Exception) -> None:
    """Ends the call with the status of `error`; raises gRPC's AbortError. Faults of ours are logged with traceback."""
    if not isinstance(error, errors.SurogateError):
        _log.error("call failed by an unexpected error", method=method, exc_info=error)
    elif isinstance(error, errors.InternalError):
        _log.error("call failed", method=method, reason=error.reason, error=error.message)
    else:
        _log.debug("call refused", method=method, reason=error.reason, error=error.message)
    status = fitted(to_status(error))
    await context.abort(code_of(error), status.message, trailing_metadata(status))
