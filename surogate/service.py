"""The life of a service process: settings, logs, metrics, serving, draining, and the exit code."""

from __future__ import annotations

import asyncio
import os
import pkgutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

from surogate.config.service import ServiceSettings, parse_settings
from surogate.errors import ConfigError, InvalidInputError, SurogateError, Violation
from surogate.process import Announcement, die_with_parent, parent_is_gone

if TYPE_CHECKING:
    from surogate.rpc.server import RpcServer

Lifespan = Callable[[Any, Any], AbstractAsyncContextManager[None]]
"""`lifespan(server: RpcServer, settings)`: registers servicers, yields while the process serves, cleans up after."""

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
_ORPHAN_DRAIN_SECONDS = 2.0
"""A service whose parent died has nobody to finish calls for; what is left to do is to clean up."""


def main(
    settings_class: type[ServiceSettings],
    lifespan: Lifespan | str,
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
) -> int:
    """A service's whole `main`: parses settings, serves until SIGTERM or SIGINT, returns the exit code.

    `lifespan` may be an import path (`trainer_svc.service:lifespan`), which is imported only after the settings were
    accepted, so that `--help` answers at once. Bad settings, a taken port and the like are one line on standard error.
    """
    try:
        settings = parse_settings(settings_class, argv, prog=prog)
    except ConfigError as error:
        return _complain(error, EXIT_USAGE)
    try:
        resolved: Lifespan = pkgutil.resolve_name(lifespan) if isinstance(lifespan, str) else lifespan
        return run_service(settings, resolved)
    except InvalidInputError as error:
        return _complain(error, EXIT_USAGE)
    except SurogateError as error:
        return _complain(error, EXIT_FAILED)


def run_service(settings: ServiceSettings, lifespan: Lifespan) -> int:
    """Serves until a signal, the parent's death or `RpcServer.fail`; returns the exit code.

    SIGTERM or SIGINT: health says NOT_SERVING, new calls are refused, those in flight get `drain_seconds`, the lifespan
    cleans up, and the code is 0. A second SIGINT exits at once with 130. Raises SurogateError if it cannot start.
    """
    from surogate.telemetry import log

    log.configure(settings.log_format, settings.log_level)
    die_with_parent()
    return asyncio.run(_serve(settings, lifespan))


async def _serve(settings: ServiceSettings, lifespan: Lifespan) -> int:
    from surogate.rpc.server import RpcServer
    from surogate.telemetry.log import get_logger

    logger = get_logger("service")
    stopping = _stop_on_signals()
    async with (
        _traces(settings),
        _metrics(settings) as metrics_address,
        _stopped(RpcServer(settings)) as server,
        lifespan(server, settings),
    ):
        await server.start()
        announcement = Announcement(server.address, metrics_address, os.getpid())
        if settings.announce_file is not None:
            _announce(announcement, settings)
        logger.info("serving", **announcement.__dict__)
        failure = await _first(stopping.wait(), server.failed())
        logger.info("draining", failure=str(failure) if failure else None)
        await server.drain(_ORPHAN_DRAIN_SECONDS if parent_is_gone() else settings.drain_seconds)
    if failure is not None:
        logger.error("stopped by a failure", error=str(failure))
        return EXIT_FAILED
    logger.info("stopped")
    return EXIT_OK


@asynccontextmanager
async def _stopped(server: RpcServer) -> AsyncIterator[RpcServer]:
    """Stops the server also when starting fails half-way."""
    try:
        yield server
    finally:
        await server.stop()


async def _first(stopped: Any, failed: Any) -> Exception | None:
    """Waits for a reason to stop: the failure, or None for an orderly stop."""
    tasks = [asyncio.ensure_future(stopped), asyncio.ensure_future(failed)]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    return tasks[1].result() if tasks[1] in done else None


def _stop_on_signals() -> asyncio.Event:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stopping.is_set() and number == signal.SIGINT:
            os._exit(EXIT_INTERRUPTED)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stopping


@asynccontextmanager
async def _traces(settings: ServiceSettings) -> AsyncIterator[None]:
    """Sends traces where the environment says so."""
    from surogate.telemetry import tracing

    tracing.configure(str(settings.model_config.get("env_prefix", "")).removeprefix("SUROGATE_").strip("_").lower())
    try:
        yield
    finally:
        await asyncio.to_thread(tracing.shutdown)


@asynccontextmanager
async def _metrics(settings: ServiceSettings) -> AsyncIterator[str]:
    """Serves Prometheus metrics; yields their address, empty when they are off."""
    if not settings.metrics_listen:
        yield ""
        return
    from surogate.rpc import address
    from surogate.telemetry import metrics

    host, port = address.split(settings.metrics_listen)
    try:
        server, port = metrics.serve(host, port)
    except OSError as error:
        why = f"cannot listen on {settings.metrics_listen}: {error.strerror or error}"
        raise ConfigError.of([Violation("metrics_listen", why)]) from error
    try:
        yield address.reachable(settings.metrics_listen, port)
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()


def _announce(announcement: Announcement, settings: ServiceSettings) -> None:
    assert settings.announce_file is not None
    try:
        announcement.write(settings.announce_file)
    except OSError as error:
        why = f"cannot write {settings.announce_file}: {error.strerror}"
        raise ConfigError.of([Violation("announce_file", why)]) from error


def _complain(error: SurogateError, code: int) -> int:
    sys.stderr.write(f"error: {error}\n")
    return code
