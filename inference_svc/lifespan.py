"""The life of the inference service: it answers at once, and serves when the model is loaded."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from inference_svc import environment
from inference_svc.engine_api import Engine, EngineDiedError
from inference_svc.model_files import is_local, read_model
from inference_svc.options import EngineOptions, resolve_options
from inference_svc.replica import Replica
from inference_svc.settings import InferenceSettings
from surogate.apart import apart
from surogate.rpc.server import RpcServer
from surogate.storage.fetch import fetch
from surogate.telemetry.log import get_logger
from surogate.urls import is_url

_log = get_logger("inference")


@asynccontextmanager
async def lifespan(server: RpcServer, settings: InferenceSettings) -> AsyncIterator[None]:
    """Registers the servicers, loads the model meanwhile, and ends the process when the engine dies.

    Raises ConfigError at once for a model directory that cannot be served.
    """
    options = resolve_options(settings)
    if is_local(options.model):
        read_model(Path(options.model))
    environment.prepare(settings)
    replica = Replica(server, settings)
    engine_task = asyncio.create_task(_run_engine(server, replica, options))
    try:
        yield
    finally:
        engine_task.cancel()
        with suppress(asyncio.CancelledError):
            await engine_task
        replica.staging.close()


async def _run_engine(server: RpcServer, replica: Replica, options: EngineOptions) -> None:
    """Loads the model, serves it until cancelled, and reports any failure to `server`."""
    engine: Engine | None = None
    try:
        if is_url(options.model):
            options = replace(options, model=str(await apart(partial(fetch, options.model, "model"))))
        loading = await apart(partial(importlib.import_module, "inference_svc.vllm_backend.loading"))  # seconds
        engine, files = await loading.load_engine(options)
        assert engine is not None
        replica.attach(engine, files)
        _log.info("model loaded", **engine.facts.__dict__)
        raise EngineDiedError(await engine.died())
    except Exception as error:  # noqa: BLE001 - whatever it is, the process cannot go on
        replica.detach()
        server.fail(error)
    finally:
        if engine is not None:
            await engine.close()
