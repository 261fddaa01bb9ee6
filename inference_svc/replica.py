"""One replica: its servicers, and the engine behind them once there is one."""

from __future__ import annotations

from datetime import timedelta

from inference_svc.engine_api import Engine
from inference_svc.model_files import ModelFiles
from inference_svc.service import NAME, InferenceServicer
from inference_svc.settings import InferenceSettings
from inference_svc.updates import Updates
from surogate.errors import UnavailableError
from surogate.rpc.server import RpcServer
from surogate.telemetry.log import bind_process
from surogate.v1 import inference_pb2_grpc, weights_pb2, weights_pb2_grpc
from surogate.weights.servicer import SERVICE as UPDATES_NAME
from surogate.weights.servicer import WeightUpdateServicer
from surogate.weights.staging import StagedUpdate, Staging


class Replica:
    """The servicers of one replica on `server`, and the engine behind them from `attach` on."""

    def __init__(self, server: RpcServer, settings: InferenceSettings) -> None:
        self._server = server
        self._settings = settings
        self._inference = InferenceServicer()
        self._updates: Updates | None = None
        self.staging = Staging(ttl=settings.update_ttl, check=self._check)
        self._whole = False
        self._current = not settings.await_weights
        servicer = WeightUpdateServicer(self.staging, self._commit, self._confirm)
        server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, self._inference, NAME, serving=False)
        server.add(weights_pb2_grpc.add_WeightUpdateServiceServicer_to_server, servicer, UPDATES_NAME, serving=False)

    def attach(self, engine: Engine, files: ModelFiles) -> None:
        """Serves by `engine` from now on."""
        updates = Updates(engine, files, keep_images=self._settings.delta_updates, serving=self._set_serving)
        self._inference.attach(engine, self._settings.max_queue, updates)
        self._updates = updates
        bind_process(policy_version=engine.policy_version)
        self._server.set_serving(UPDATES_NAME, True)
        self._set_serving(True)

    def detach(self) -> None:
        """Reports NOT_SERVING for good: the engine is gone, or never came."""
        self._server.set_serving(UPDATES_NAME, False)
        self._set_serving(False)

    def _set_serving(self, whole: bool) -> None:
        self._whole = whole
        self._show()

    def _confirm(self) -> None:
        """The served version is the one to serve."""
        self._current = True
        self._show()

    def _show(self) -> None:
        self._server.set_serving(NAME, self._whole and self._current)

    def _check(self, manifest: weights_pb2.WeightManifest) -> None:
        self._loaded().check(manifest)

    async def _commit(self, staged: StagedUpdate) -> timedelta:
        pause = await self._loaded().commit(staged)
        if staged.manifest.kind != weights_pb2.WEIGHT_KIND_BASE:  # after a base come the adapters
            self._confirm()
        return pause

    def _loaded(self) -> Updates:
        if self._updates is None:
            raise UnavailableError("the model is being loaded", reason="LOADING")
        return self._updates
