"""Weight updates as this service takes them: whether they fit, and how the engine swaps to them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from inference_svc.engine_api import Engine
from inference_svc.model_files import ModelFiles
from inference_svc.update_checks import UpdateChecks
from surogate.errors import FailedPreconditionError
from surogate.telemetry.log import bind_process, get_logger
from surogate.v1 import weights_pb2
from surogate.weights.staging import StagedUpdate

_ADAPTER_NAME = "policy"
_log = get_logger("inference")


class Updates:
    """The served weights as a stack: the checkpoint, the images on top of it, and perhaps an adapter.

    With `keep_images`, images that later deltas may build on are kept beside the staged ones. `serving(bool)` is told
    whether the weights are whole.
    """

    def __init__(
        self, engine: Engine, files: ModelFiles, *, keep_images: bool, serving: Callable[[bool], None]
    ) -> None:
        self._engine = engine
        self._files = files
        self._checks = UpdateChecks(files, engine.facts.max_lora_rank)
        self._keep_images = keep_images
        self._serving = serving
        self._images: list[Path] = []
        self._replaced = False
        self.adapter = ""
        """Name of the adapter that serves; empty while there is none."""
        self.base_id = ""
        """Id of the base that was pushed under adapters, or with them merged; empty for the model as loaded."""

    def check(self, manifest: weights_pb2.WeightManifest) -> None:
        """Raises InvalidInputError or FailedPreconditionError for an update that can never be committed."""
        self._checks.check(manifest)
        if manifest.kind == weights_pb2.WEIGHT_KIND_LORA:
            self._check_under_adapter(manifest.base_id)
        if manifest.kind == weights_pb2.WEIGHT_KIND_DELTA and manifest.base_version:
            self._check_under_delta()

    async def commit(self, staged: StagedUpdate) -> timedelta:
        """Swaps to the staged weights; returns the pause. After a failure nothing is served until the next commit."""
        manifest, image = staged.manifest, staged.path
        start = time.perf_counter()
        try:
            if manifest.kind == weights_pb2.WEIGHT_KIND_LORA:
                pause = await self._swap_adapter(manifest, image)
            else:
                pause = await self._swap_weights(manifest, image)
        except BaseException:
            self._serving(False)
            raise
        self._serving(True)
        bind_process(policy_version=manifest.version)
        _log.info(
            "weights committed",
            kind=weights_pb2.WeightKind.Name(manifest.kind).removeprefix("WEIGHT_KIND_"),
            version=manifest.version,
            bytes=manifest.num_bytes,
            pause_seconds=round(pause, 4),
            seconds=round(time.perf_counter() - start, 4),
        )
        return timedelta(seconds=pause)

    def _checkpoint_files(self) -> list[Path]:
        return sorted({info.file for info in self._files.tensors.values()})

    def _forget_images(self) -> None:
        for image in self._images:
            image.unlink(missing_ok=True)
        self._images.clear()

    def _check_under_adapter(self, base_id: str) -> None:
        if self._replaced:
            raise FailedPreconditionError(
                "other weights were pushed before: an adapter needs the model as loaded; restart the replica",
                reason="BASE_REPLACED",
            )
        if base_id != self.base_id:
            raise FailedPreconditionError(
                f"the adapter fits {_named(base_id)}, and {_named(self.base_id)} is served: "
                f"{'push that base first' if base_id else 'restart the replica'}",
                reason="OTHER_BASE",
            )

    def _check_under_delta(self) -> None:
        if self.adapter:
            raise FailedPreconditionError(
                "an adapter is served, and a delta changes the weights beneath it; push FULL weights",
                reason="BASE_IS_ADAPTER",
            )
        if self._replaced and not self._images:
            raise FailedPreconditionError(
                "the image of the last update was not kept; start the replica with --delta-updates",
                reason="BASE_NOT_KEPT",
            )

    async def _swap_adapter(self, manifest: weights_pb2.WeightManifest, image: Path) -> float:
        with tempfile.TemporaryDirectory(prefix="adapter-", dir=image.parent) as folder:
            directory = Path(folder)
            os.link(image, directory / "adapter_model.safetensors")
            (directory / "adapter_config.json").write_text(manifest.adapter_config_json, encoding="utf-8")
            pause = await self._engine.swap_adapter(directory, manifest.version)
        self.adapter = manifest.adapter_name or _ADAPTER_NAME
        return pause

    async def _swap_weights(self, manifest: weights_pb2.WeightManifest, image: Path) -> float:
        delta = manifest.kind == weights_pb2.WEIGHT_KIND_DELTA
        on_images = delta and manifest.base_version > 0  # version 0 is the checkpoint, whatever serves
        below = [*(self._images if on_images else ()), *(self._checkpoint_files() if delta else ())]
        self._replaced, self.base_id = True, ""
        pause = await self._engine.swap_weights([image, *below], manifest.version)
        self.adapter = ""
        self._replaced, self.base_id = manifest.kind != weights_pb2.WEIGHT_KIND_BASE, manifest.base_id
        if not on_images:
            self._forget_images()
        if self._keep_images:
            kept = image.parent / f"kept-{manifest.version}.safetensors"
            os.link(image, kept)
            self._images.insert(0, kept)
        return pause


def _named(base_id: str) -> str:
    return f"the base {base_id}" if base_id else "the model as loaded"
