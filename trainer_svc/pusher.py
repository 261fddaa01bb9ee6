"""From the worker's weights to the replicas: one exported image a version, pushed as often as it is asked for."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from surogate.errors import FailedPreconditionError, InternalError, InvalidInputError, SurogateError
from surogate.internal.v1 import worker_pb2 as worker
from surogate.rpc.status import to_status
from surogate.v1 import trainer_pb2 as trainer
from surogate.v1 import weights_pb2 as weights
from surogate.weights.push import PushReport, push
from trainer_svc import metrics
from trainer_svc.scratch import Scratch

Export = Callable[[int, str], Awaitable[worker.ExportWeightsReply]]
"""`export(version, folder)`: has the worker write the image, or says why it cannot."""

Push = Callable[..., Awaitable[PushReport]]
"""`surogate.weights.push.push`, or a stand-in."""


@dataclass(frozen=True)
class _Image:
    path: str
    manifest: weights.WeightManifest
    update_id: str
    """The same for every push of the image, so that a replica that has it already says so."""


class WeightPusher:
    """Keeps the newest exported image, so that a replica that comes late or restarts is given the same bytes."""

    def __init__(
        self,
        scratch: Scratch,
        export: Export,
        *,
        adapter_name: str = "",
        base_id: str = "",
        base_folder: Path | None = None,
        send: Push | None = None,
    ) -> None:
        """`base_id` names the base under the adapters where that is not the model as replicas load it; it is version 0,
        and its image stays in `base_folder`, on disk: it has the size of the whole model."""
        self._scratch = scratch
        self._export = export
        self._adapter_name = adapter_name
        self._base_id = base_id
        self._base_folder = base_folder
        self._send = send or push
        self._image: _Image | None = None
        self._base: _Image | None = None
        self._lock = asyncio.Lock()
        self.committed = 0
        """Last version that a replica committed."""

    async def push(self, version: int, targets: Sequence[str]) -> trainer.PushWeightsResponse:
        """Pushes `version` to every target; exports it first if that has not been done.

        Raises InvalidInputError for targets or a version that cannot be meant, and what the export raises. What goes
        wrong at a replica is in the response; before the commit that keeps the others from committing, too.
        """
        _check(version, targets, has_base=bool(self._base_id))
        async with self._lock:
            image = await (self._image_of(version) if version else self._image_of_base())
            try:
                report = await self._send(image.path, image.manifest, list(targets), update_id=image.update_id)
            except SurogateError as error:
                if isinstance(error, InternalError) and not error.metadata.keys() & set(targets):
                    self.close()  # the image itself is not what it should be: export it anew next time
                    raise
                metrics.PUSHES.labels("failed").inc(len(targets))
                return _response(image.manifest, targets, _not_committed(error, targets))
            if len(report.errors) < len(targets):
                self.committed = max(self.committed, version)
            _count(report, len(targets), self.committed)
        response = _response(image.manifest, targets, report.errors)
        response.seconds = report.seconds
        response.pause_seconds = report.pause_seconds
        return response

    def close(self) -> None:
        """Frees the images' memory and disk."""
        self._drop_image()
        if self._base is not None:
            self._base = None
            shutil.rmtree(self._base_folder or "", ignore_errors=True)

    async def _image_of(self, version: int) -> _Image:
        if self._image is not None and self._image.manifest.version == version:
            return self._image
        reply = await self._export(version, str(self._scratch.subfolder(f"v{version}")))
        self._drop_image()
        reply.manifest.adapter_name = self._adapter_name
        reply.manifest.base_id = self._base_id
        self._image = _Image(reply.path, reply.manifest, f"v{version}-{uuid.uuid4().hex}")
        return self._image

    async def _image_of_base(self) -> _Image:
        if self._base is None:
            assert self._base_folder is not None, "a base has its folder"
            shutil.rmtree(self._base_folder, ignore_errors=True)
            self._base_folder.mkdir(parents=True)
            reply = await self._export(0, str(self._base_folder))
            reply.manifest.base_id = self._base_id
            self._base = _Image(reply.path, reply.manifest, f"base-{uuid.uuid4().hex}")
        return self._base

    def _drop_image(self) -> None:
        if self._image is not None:
            self._scratch.remove(f"v{self._image.manifest.version}")
            self._image = None


def _check(version: int, targets: Sequence[str], *, has_base: bool) -> None:
    if version < 0 or (version == 0 and not has_base):
        raise InvalidInputError(f"version is {version}; 0 is the model as loaded, which replicas have already")
    if not targets or not all(targets):
        raise InvalidInputError("targets names no replica, or an empty address")
    if len(set(targets)) != len(targets):
        raise InvalidInputError("targets names a replica twice")


def _not_committed(error: SurogateError, targets: Sequence[str]) -> dict[str, SurogateError]:
    """Errors by target when staging failed: for those that `error` names their own, for the others that of the push."""
    innocent = FailedPreconditionError(f"nothing was committed, the old version serves: {error}", reason="PUSH_ABORTED")
    named = [target for target in targets if target in error.metadata] or list(targets)
    return {target: error if target in named else innocent for target in targets}


def _count(report: PushReport, targets: int, committed: int) -> None:
    taken = targets - len(report.errors)
    metrics.PUSHES.labels("committed").inc(taken)
    metrics.PUSHES.labels("failed").inc(len(report.errors))
    metrics.PUSH_BYTES.inc(report.num_bytes * taken)
    metrics.PUSH_SECONDS.observe(report.seconds)
    metrics.POLICY_VERSION.set(committed)


def _response(
    manifest: weights.WeightManifest, targets: Sequence[str], errors: Mapping[str, SurogateError]
) -> trainer.PushWeightsResponse:
    response = trainer.PushWeightsResponse(version=manifest.version, kind=manifest.kind, num_bytes=manifest.num_bytes)
    for target in targets:
        error = errors.get(target)
        response.replicas.add(target=target, error=to_status(error) if error else None)
    return response
