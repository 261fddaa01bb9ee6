"""The sending end of a weight push: one image to all replicas, which all commit it or all keep what they serve."""

from __future__ import annotations

import asyncio
import copy
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import grpc

from surogate.errors import (
    DeadlineError,
    FailedPreconditionError,
    InternalError,
    InvalidInputError,
    SurogateError,
    UnavailableError,
)
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.telemetry.log import get_logger
from surogate.v1 import weights_pb2, weights_pb2_grpc
from surogate.weights.transports import ChunkUpload, announce_staged, copy_to_shared

Transport = Literal["none", "shared_memory", "grpc"]
_State = weights_pb2.WeightUpdate
_SERVICE = "surogate.v1.WeightUpdateService"
_IDEMPOTENT = [f"{_SERVICE}/{m}WeightUpdate" for m in ("Create", "Commit", "Abort", "Get")]
_ABORT_SECONDS = 10.0
_log = get_logger("weights")


@dataclass
class ReplicaReport:
    """What became of the push on one replica; `error` is None where it serves the version."""

    target: str
    transport: Transport = "none"
    pause_seconds: float = 0.0
    error: SurogateError | None = None


@dataclass(frozen=True)
class PushReport:
    """What became of a push that was committed somewhere, or everywhere."""

    version: int
    num_bytes: int
    """Bytes that each replica took."""
    seconds: float
    """From the first call to the last commit."""
    replicas: Sequence[ReplicaReport] = field(default_factory=tuple)
    """One per target, in the order given."""

    @property
    def pause_seconds(self) -> float:
        """The longest pause of a replica."""
        return max((replica.pause_seconds for replica in self.replicas), default=0.0)

    @property
    def errors(self) -> Mapping[str, SurogateError]:
        """By target: why its commit failed. Such a replica does not serve until it is pushed again."""
        return {replica.target: replica.error for replica in self.replicas if replica.error is not None}


async def push(
    image_path: Path | str,
    manifest: weights_pb2.WeightManifest,
    targets: Sequence[str],
    security: ClientSecurity | None = None,
    *,
    version: int | None = None,
    update_id: str | None = None,
    shared_memory: bool = True,
    stage_timeout: float = 3600.0,
    commit_timeout: float = 1800.0,
) -> PushReport:
    """Uploads an image to every target, and commits it once all have staged it.

    If any fails before that, all are aborted, and the first one's error is raised, with every failed target in its
    message and metadata: the old version serves everywhere. Commits are not atomic over replicas: those that fail are
    in the report. A repeat with the same `update_id` picks up where the last one stopped. `shared_memory=False` sends
    over gRPC even on the same host. Timeouts are in seconds.
    """
    image = Path(image_path)
    _check(image, manifest, targets, version)
    start = time.perf_counter()
    update_id = update_id or f"v{manifest.version}-{uuid.uuid4().hex}"
    async with AsyncExitStack() as stack:
        replicas = [
            _Replica(
                await stack.enter_async_context(_open(target, security)),
                ReplicaReport(target),
                update_id,
                ChunkUpload(
                    target, security or ClientSecurity.from_env(), image, manifest.num_bytes, timeout=stage_timeout
                ),
            )
            for target in targets
        ]
        try:
            await _stage_all(replicas, image, manifest, shared_memory, stage_timeout)
        except BaseException:
            await asyncio.shield(asyncio.gather(*(replica.abort() for replica in replicas)))
            raise
        await asyncio.gather(*(replica.commit(commit_timeout) for replica in replicas))
    report = PushReport(
        manifest.version, manifest.num_bytes, time.perf_counter() - start, [replica.report for replica in replicas]
    )
    _log_report(report)
    return report


class _Replica:
    """One target of a push, and what is known of it."""

    def __init__(self, channel: grpc.aio.Channel, report: ReplicaReport, update_id: str, upload: ChunkUpload) -> None:
        self.report = report
        self._channel = channel
        self._stub = weights_pb2_grpc.WeightUpdateServiceStub(channel)
        self._update_id = update_id
        self._upload = upload
        self._committed = False

    async def stage(self, image: Path, manifest: weights_pb2.WeightManifest, shared_memory: bool) -> None:
        """Returns when the replica has staged the image, or has it committed already."""
        update = await self._stub.CreateWeightUpdate(
            weights_pb2.CreateWeightUpdateRequest(update_id=self._update_id, manifest=manifest)
        )
        if shared_memory and update.HasField("shared_staging"):
            update = await self._share(update, image, manifest.num_bytes)
        if update.state == _State.STATE_UPLOADING:
            self.report.transport = "grpc"
            update = await self._upload.run(update, self._refresh)
        if update.state not in (_State.STATE_STAGED, _State.STATE_COMMITTED):
            raise FailedPreconditionError("the replica dropped the update: another one replaced it, or it was aborted")
        self._committed = update.state == _State.STATE_COMMITTED

    async def commit(self, timeout: float) -> None:
        """Commits; a failure is put into the report."""
        if self._committed:
            return
        request = weights_pb2.CommitWeightUpdateRequest(update_id=self._update_id)
        try:
            update = await self._stub.CommitWeightUpdate(request, timeout=timeout)
        except SurogateError as error:
            self.report.error = error
        else:
            self.report.pause_seconds = update.pause.seconds + update.pause.nanos / 1e9

    async def abort(self) -> None:
        """Drops the update, as far as the replica can be reached; elsewhere it expires by itself."""
        request = weights_pb2.AbortWeightUpdateRequest(update_id=self._update_id)
        with suppress(SurogateError):
            await self._stub.AbortWeightUpdate(request, timeout=_ABORT_SECONDS)

    async def _share(self, update: weights_pb2.WeightUpdate, image: Path, num_bytes: int) -> weights_pb2.WeightUpdate:
        try:
            copied = await asyncio.to_thread(copy_to_shared, image, update.shared_staging, num_bytes)
        except OSError as error:
            _log.warning("copying to the replica's memory failed; sending over gRPC", error=str(error))
            return update
        if not copied:
            return update
        self.report.transport = "shared_memory"
        try:
            return await announce_staged(self._channel, self._update_id)
        except UnavailableError:
            return await self._refresh()  # whether it got the message, or needs the bytes over gRPC

    async def _refresh(self) -> weights_pb2.WeightUpdate:
        update: weights_pb2.WeightUpdate = await self._stub.GetWeightUpdate(
            weights_pb2.GetWeightUpdateRequest(update_id=self._update_id)
        )
        return update


def _open(target: str, security: ClientSecurity | None) -> grpc.aio.Channel:
    return open_channel(target, security, idempotent=_IDEMPOTENT)


def _check(image: Path, manifest: weights_pb2.WeightManifest, targets: Sequence[str], version: int | None) -> None:
    if not targets or len(set(targets)) != len(targets):
        raise InvalidInputError("targets: name each replica once, and at least one")
    if version is not None and version != manifest.version:
        raise InvalidInputError(f"version {version} was asked for; the manifest is of version {manifest.version}")
    try:
        found = image.stat().st_size
    except OSError as error:
        raise InternalError(f"the weight image {image} cannot be read: {error.strerror}") from error
    if found != manifest.num_bytes:
        raise InternalError(f"the weight image {image} has {found} bytes; its manifest says {manifest.num_bytes}")


async def _stage_all(
    replicas: Sequence[_Replica],
    image: Path,
    manifest: weights_pb2.WeightManifest,
    shared_memory: bool,
    timeout: float,
) -> None:
    """Stages on all side by side. The first failure stops the others: nothing will be committed anyway."""
    tasks = [asyncio.create_task(replica.stage(image, manifest, shared_memory)) for replica in replicas]
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
        unfinished = [r.report.target for r, task in zip(replicas, tasks, strict=True) if not task.done()]
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    failures = {
        replica.report.target: error
        for replica, error in zip(replicas, results, strict=True)
        if isinstance(error, Exception)
    }
    if failures:
        raise _failed(manifest.version, len(replicas), failures)
    if unfinished:
        raise DeadlineError(
            f"version {manifest.version} was not staged within {timeout:g} s on {', '.join(unfinished)}; "
            "the old version serves everywhere"
        )


def _failed(version: int, count: int, failures: Mapping[str, Exception]) -> Exception:
    """The first failure, of its own class, telling of all of them."""
    first = next(iter(failures.values()))
    if not isinstance(first, SurogateError):
        return first  # a fault of ours: its traceback says more
    told = "; ".join(f"{target}: {error}" for target, error in failures.items())
    error = copy.copy(first)
    error.message = (
        f"version {version} could not be staged on {len(failures)} of {count} replicas, "
        f"the old version serves everywhere: {told}"
    )
    error.metadata = {**first.metadata, **{target: str(failure) for target, failure in failures.items()}}
    error.__cause__ = first
    return error


def _log_report(report: PushReport) -> None:
    _log.info(
        "weights pushed",
        version=report.version,
        bytes=report.num_bytes,
        seconds=round(report.seconds, 4),
        pause_seconds=round(report.pause_seconds, 4),
        transports=sorted({replica.transport for replica in report.replicas}),
        failed={target: str(error) for target, error in report.errors.items()},
    )
