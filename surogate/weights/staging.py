"""The receiving end of a weight push: one update at a time, from announced to served.

UPLOADING → STAGED → COMMITTED, or ABORTED on the way, or FAILED when the swap itself went wrong. Until the commit
nothing that serves is touched.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import xxhash

from surogate.errors import (
    AlreadyExistsError,
    BusyError,
    DataLossError,
    FailedPreconditionError,
    InternalError,
    InvalidInputError,
    NotFoundError,
    OutOfRangeError,
    SurogateError,
)
from surogate.telemetry.log import get_logger
from surogate.telemetry.tracing import span
from surogate.v1 import weights_pb2
from surogate.weights import metrics
from surogate.weights.manifest import check_manifest, fingerprint
from surogate.weights.memory import SHM, ImageFile, MemoryDirectory
from surogate.weights.ranges import RangeSet
from surogate.weights.verify import ChecksumError, verify_image

State = weights_pb2.WeightUpdate
Check = Callable[[weights_pb2.WeightManifest], None]
"""Raises InvalidInputError or FailedPreconditionError for an update that the model can never take."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_REMEMBERED = 32
_INLINE_BYTES = 2 << 20
"""Chunks up to this are written on the event loop: a fraction of a millisecond, less than a hop to a thread costs."""

_log = get_logger("weights")


@dataclass(frozen=True)
class StagedUpdate:
    """What a commit gets: verified weights. The file at `path` is removed after the commit, whatever comes of it;
    what shall outlive it is linked (`os.link`) into another place on the same file system, `path.parent` for one."""

    update_id: str
    manifest: weights_pb2.WeightManifest
    path: Path


Commit = Callable[[StagedUpdate], Awaitable[timedelta]]
"""Swaps to the staged weights and returns the time for which generation paused. Whatever it raises leaves the replica
without a version that is known to be whole: the update is FAILED, and the callback reports NOT_SERVING."""


@dataclass(eq=False)
class Update:
    """An update and its file; `file` is None once it has ended."""

    update_id: str
    manifest: weights_pb2.WeightManifest
    fingerprint: bytes
    file: ImageFile | None
    state: weights_pb2.WeightUpdate.State.ValueType
    expires: float
    received: RangeSet = field(default_factory=RangeSet)
    pause: timedelta | None = None
    committing: asyncio.Task[None] | None = None
    verifying: asyncio.Lock = field(default_factory=asyncio.Lock)

    def to_proto(self) -> weights_pb2.WeightUpdate:
        """As the contract shows it."""
        shown = weights_pb2.WeightUpdate(update_id=self.update_id, state=self.state, version=self.manifest.version)
        shown.received.extend(weights_pb2.ByteRange(begin=begin, end=end) for begin, end in self.received)
        shown.expire_time.FromNanoseconds(int(self.expires * 1e9))
        if self.pause is not None:
            shown.pause.FromTimedelta(self.pause)
        if self.file is not None and self.state == State.STATE_UPLOADING:
            shown.shared_staging.path = str(self.file.path)
            shown.shared_staging.nonce = self.file.nonce
        return shown


class Staging:
    """Holds the update that is under way, and remembers the last ended ones so that repeated calls get their answer.

    Images live in `directory` (a new MemoryDirectory without one). An update to which nothing arrives for `ttl` seconds
    is dropped. `max_bytes` bounds an image. Belongs to one event loop; `close` it.
    """

    def __init__(
        self, *, root: Path = SHM, ttl: float = 600.0, max_bytes: int | None = None, check: Check | None = None
    ) -> None:
        self.served_version = 0
        """Version of the last commit; 0 for the model as loaded."""
        self._memory = MemoryDirectory(root)
        self._ttl = ttl
        self._max_bytes = max_bytes
        self._check = check
        self._updates: OrderedDict[str, Update] = OrderedDict()
        self._current: Update | None = None
        self._failed = False
        self._creating = asyncio.Lock()
        self._expiry: asyncio.TimerHandle | None = None

    @property
    def directory(self) -> Path:
        """The private folder in memory where images are; also for what a commit wants to keep."""
        return self._memory.path

    def close(self) -> None:
        """Drops what is under way and removes all files."""
        if self._expiry is not None:
            self._expiry.cancel()
        if self._current is not None and self._current.file is not None:
            self._current.file.drop()
        self._memory.close()

    async def create(self, update_id: str, manifest: weights_pb2.WeightManifest) -> Update:
        """Announces an update and reserves memory for it; see CreateWeightUpdate."""
        if not _ID.fullmatch(update_id):
            raise InvalidInputError("update_id: must be 1 to 128 letters, digits, dots, hyphens and underscores")
        async with self._creating:
            known = self._known(update_id, fingerprint(manifest))
            if known is not None:
                return known
            self._admit(manifest)
            self._drop_current("replaced by another update")
            return self._enter(update_id, manifest, await self._allocate(manifest.num_bytes))

    def get(self, update_id: str) -> Update:
        """The update. Raises NotFoundError."""
        try:
            return self._updates[update_id]
        except KeyError:
            raise NotFoundError(
                f"there is no weight update {update_id!r}; it may have been made before a restart"
            ) from None

    async def write(self, update: Update, offset: int, data: bytes, xxh3: int) -> None:
        """Takes a chunk. Bytes that arrived before are left as they are."""
        end = offset + len(data)
        if offset < 0 or end > update.manifest.num_bytes:
            size = update.manifest.num_bytes
            raise OutOfRangeError(
                f"bytes {offset} to {end} are outside the image of {size} bytes", reason="OUTSIDE_IMAGE"
            )
        if xxhash.xxh3_64_intdigest(data) != xxh3:
            raise DataLossError(f"wrong checksum of the chunk at byte {offset}: send it again", reason="CHECKSUM")
        if update.received.covers(offset, end):
            return
        file = self._open_file(update)
        if len(data) <= _INLINE_BYTES:
            file.write(offset, data)
        else:
            await file.in_thread(file.write, offset, data)
        update.received.add(offset, end)
        update.expires = time.time() + self._ttl
        metrics.RECEIVED_BYTES.inc(len(data))

    async def finish(self, update: Update, *, staged_by_caller: bool = False) -> Update:
        """Verifies the image once all of it has arrived; before that it changes nothing."""
        if staged_by_caller and update.state == State.STATE_UPLOADING:
            update.received.add(0, update.manifest.num_bytes)
        async with update.verifying:
            if update.state == State.STATE_UPLOADING and not update.received.missing(update.manifest.num_bytes):
                await self._verify(update)
        if update.state == State.STATE_ABORTED:
            raise _gone(update)
        return update

    async def commit(self, update: Update, swap: Commit) -> Update:
        """Swaps to the update. Once begun it goes on to its end, also if the caller leaves; a repeat waits for it."""
        if update.committing is None:
            if update.state != State.STATE_STAGED:
                raise FailedPreconditionError(
                    f"weight update {update.update_id} is {_name(update.state)}, not STAGED", reason="NOT_STAGED"
                )
            update.committing = asyncio.create_task(self._commit(update, swap))
        await asyncio.shield(update.committing)
        return update

    async def abort(self, update_id: str) -> None:
        """Drops an update that is not committed. Raises FailedPreconditionError while or after it is."""
        async with self._creating:  # one that is being created is dropped, too
            self._abort(update_id)

    def _abort(self, update_id: str) -> None:
        update = self._updates.get(update_id)
        if update is None or update.state in (State.STATE_ABORTED, State.STATE_FAILED):
            return
        if update.state == State.STATE_COMMITTED or update.committing is not None:
            raise FailedPreconditionError(f"weight update {update_id} is committed already", reason="COMMITTED")
        self._drop_current("aborted by the caller")

    def _known(self, update_id: str, mark: bytes) -> Update | None:
        known = self._updates.get(update_id)
        if known is None or known.state in (State.STATE_ABORTED, State.STATE_FAILED):
            return None
        if known.fingerprint != mark:
            raise AlreadyExistsError(f"there is a weight update {update_id!r} with another manifest")
        return known

    def _admit(self, manifest: weights_pb2.WeightManifest) -> None:
        check_manifest(manifest, self._max_bytes)
        self._admit_version(manifest)
        if manifest.kind == weights_pb2.WEIGHT_KIND_DELTA:
            self._admit_delta(manifest)
        if self._check is not None:
            self._check(manifest)
        if self._current is not None and self._current.committing is not None:
            raise BusyError("a weight update is being committed; try again when it is done")

    def _admit_version(self, manifest: weights_pb2.WeightManifest) -> None:
        if manifest.kind == weights_pb2.WEIGHT_KIND_BASE and self.served_version:
            raise FailedPreconditionError(
                f"version {self.served_version} is served: a base comes before all versions; restart the replica",
                reason="VERSION_NOT_NEWER",
                metadata={"served": str(self.served_version)},
            )
        if manifest.kind != weights_pb2.WEIGHT_KIND_BASE and manifest.version <= self.served_version:
            raise FailedPreconditionError(
                f"version {manifest.version} is not newer than version {self.served_version}, which is served",
                reason="VERSION_NOT_NEWER",
                metadata={"served": str(self.served_version)},
            )

    def _admit_delta(self, manifest: weights_pb2.WeightManifest) -> None:
        if not manifest.base_version:
            return  # the model as loaded, which every replica has
        if self._failed or manifest.base_version != self.served_version:
            served = "nothing whole since a commit failed" if self._failed else f"version {self.served_version}"
            raise FailedPreconditionError(
                f"the delta builds on version {manifest.base_version}, but {served} is served; push FULL weights",
                reason="WRONG_BASE_VERSION",
            )

    async def _allocate(self, num_bytes: int) -> ImageFile:
        allocation = asyncio.ensure_future(asyncio.to_thread(ImageFile, self.directory, num_bytes))
        try:
            return await asyncio.shield(allocation)
        except asyncio.CancelledError:
            allocation.add_done_callback(_drop_allocated)  # the thread goes on, and nobody would know its file
            await asyncio.wait([allocation])
            raise

    def _enter(self, update_id: str, manifest: weights_pb2.WeightManifest, file: ImageFile) -> Update:
        kept = weights_pb2.WeightManifest()
        kept.CopyFrom(manifest)
        update = Update(
            update_id, kept, fingerprint(manifest), file, State.STATE_UPLOADING, expires=time.time() + self._ttl
        )
        self._updates.pop(update_id, None)
        self._updates[update_id] = self._current = update
        while len(self._updates) > _REMEMBERED:
            self._updates.popitem(last=False)
        self._watch_expiry(update)
        return update

    async def _verify(self, update: Update) -> None:
        start = time.perf_counter()
        file = self._open_file(update)
        manifest = weights_pb2.WeightManifest()
        manifest.CopyFrom(update.manifest)  # the update's own is emptied when it is dropped
        try:
            await file.in_thread(verify_image, file.fd, manifest)
        except ChecksumError as error:
            for offset, length in error.spans:
                update.received.remove(offset, offset + length)
            raise
        except SurogateError:
            if update is self._current:
                self._drop_current("the image does not agree with its manifest")
            raise
        if update.state == State.STATE_UPLOADING:
            update.state = State.STATE_STAGED
        metrics.UPDATE_SECONDS.labels("verify").observe(time.perf_counter() - start)

    async def _commit(self, update: Update, swap: Commit) -> None:
        start = time.perf_counter()
        file = self._open_file(update)
        try:
            with span("commit", version=update.manifest.version):
                update.pause = await swap(StagedUpdate(update.update_id, update.manifest, file.path))
        except Exception as error:
            update.state, self._failed = State.STATE_FAILED, True
            _log.error("commit of weights failed", version=update.manifest.version, exc_info=error)
            if isinstance(error, SurogateError):
                raise
            raise InternalError(
                f"the commit failed: {type(error).__name__}: {error}", reason="COMMIT_FAILED"
            ) from error
        else:
            update.state, self._failed = State.STATE_COMMITTED, False
            self.served_version = update.manifest.version
            metrics.UPDATE_SECONDS.labels("commit").observe(time.perf_counter() - start)
            metrics.UPDATE_SECONDS.labels("pause").observe(update.pause.total_seconds())
        finally:
            self._end(update)

    def _drop_current(self, why: str) -> None:
        update = self._current
        if update is None:
            return
        update.state = State.STATE_ABORTED
        _log.info("weight update dropped", update_id=update.update_id, version=update.manifest.version, why=why)
        self._end(update)

    def _end(self, update: Update) -> None:
        if update.file is not None:
            update.file.drop()
            update.file = None
        if self._current is update:
            self._current = None
        del update.manifest.tensors[:]  # what is remembered is small

    def _open_file(self, update: Update) -> ImageFile:
        if update.file is None:
            raise _gone(update)
        return update.file

    def _watch_expiry(self, update: Update) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        delay = max(0.01, update.expires - time.time())
        self._expiry = asyncio.get_running_loop().call_later(delay, self._expire, update)

    def _expire(self, update: Update) -> None:
        if update is not self._current or update.committing is not None:
            return
        if time.time() < update.expires:
            self._watch_expiry(update)
        else:
            self._drop_current(f"nothing arrived for {self._ttl:g} s")


def _drop_allocated(allocation: asyncio.Future[ImageFile]) -> None:
    if not allocation.cancelled() and allocation.exception() is None:
        allocation.result().drop()


def _gone(update: Update) -> FailedPreconditionError:
    message = f"weight update {update.update_id} is {_name(update.state)}: it takes no more bytes"
    return FailedPreconditionError(message, reason=f"UPDATE_{_name(update.state)}")


def _name(state: weights_pb2.WeightUpdate.State.ValueType) -> str:
    return State.State.Name(state).removeprefix("STATE_")
