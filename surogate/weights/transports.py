"""How the bytes of an image get to a replica: over gRPC in several streams, or through a file that both ends share."""

from __future__ import annotations

import asyncio
import errno
import hmac
import os
import stat
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import xxhash

from surogate.errors import DataLossError, InternalError, SurogateError, UnavailableError
from surogate.rpc.channel import ClientSecurity, open_blocking_channel
from surogate.rpc.security import authorization
from surogate.rpc.status import from_rpc_error
from surogate.telemetry import tracing
from surogate.v1 import weights_pb2, weights_pb2_grpc
from surogate.weights.memory import SHM
from surogate.weights.ranges import Range, RangeSet

CHUNK_BYTES = 1 << 20
STREAMS = 2
"""Connections per replica: a second one helps, further ones only compete for the receiver's event loop."""
_ONE_STREAM_BYTES = 4 << 20
_MAX_STALLS = 6
_MAX_DATA_LOSSES = 2
_COPY_THREADS = 2
_NOT_HERE = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})

Refresh = Callable[[], Awaitable[weights_pb2.WeightUpdate]]


class ChunkUpload:
    """Uploads an image to one replica in parallel streams, and goes on from what arrived when a connection breaks.

    gRPC's threaded client sends: its C core works outside the event loop, which stays free for other things.
    """

    def __init__(self, target: str, security: ClientSecurity, image: Path, num_bytes: int, *, timeout: float) -> None:
        self._target = target
        self._security = security
        self._token = security.token_source()
        self._image = image
        self._num_bytes = num_bytes
        self._timeout = timeout

    async def run(self, update: weights_pb2.WeightUpdate, refresh: Refresh) -> weights_pb2.WeightUpdate:
        """Returns the update when the replica takes no more bytes: STAGED, unless it dropped it. `refresh` asks it what
        has arrived.

        Raises UnavailableError after several broken connections without a byte of progress between them, DataLossError
        when bytes arrive wrong again and again, and what the replica refuses with.
        """
        stalls = losses = 0
        while update.state == weights_pb2.WeightUpdate.STATE_UPLOADING:
            missing = _missing(update, self._num_bytes)
            try:
                await self._send(update.update_id, missing)
            except DataLossError:
                losses += 1
                if losses > _MAX_DATA_LOSSES:
                    raise
            except UnavailableError:
                stalls += 1
                if stalls > _MAX_STALLS:
                    raise
                await asyncio.sleep(min(2.0, 0.1 * 2**stalls))
            update = await refresh()
            if _length(_missing(update, self._num_bytes)) < _length(missing):
                stalls = 0
        return update

    async def _send(self, update_id: str, missing: Sequence[Range]) -> None:
        """One attempt. What is wrong with the image as a whole is raised by the stream that ends last."""
        shares = _shares(missing, STREAMS if _length(missing) > _ONE_STREAM_BYTES else 1)
        results = await asyncio.gather(*(self._stream(update_id, share) for share in shares), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            raise next((f for f in failures if not isinstance(f, UnavailableError)), failures[0])

    async def _stream(self, update_id: str, ranges: Sequence[Range]) -> None:
        metadata = (*authorization(self._token()), *tracing.to_metadata())
        with open_blocking_channel(self._target, self._security) as channel:  # leaving it cancels the call
            call = weights_pb2_grpc.WeightUpdateServiceStub(channel).UploadWeights.future(
                _chunks(self._image, update_id, ranges),
                timeout=self._timeout,
                metadata=metadata,
            )
            await _done(call)


async def announce_staged(channel: grpc.aio.Channel, update_id: str) -> weights_pb2.WeightUpdate:
    """Tells a replica that the caller wrote the whole image through shared staging; it verifies it."""

    async def only_message() -> Any:
        yield weights_pb2.UploadWeightsRequest(update_id=update_id, staged_by_caller=True)

    update: weights_pb2.WeightUpdate = await weights_pb2_grpc.WeightUpdateServiceStub(channel).UploadWeights(
        only_message()
    )
    return update


def copy_to_shared(image: Path, staging: weights_pb2.SharedStaging, num_bytes: int) -> bool:
    """Copies an image into the file that a replica offers; False if that file is not on this host, or not ours to open.

    Blocks: for a thread. Raises DataLossError if the image is shorter than promised, OSError if copying fails.
    """
    fd = _open_shared(staging, num_bytes)
    if fd is None:
        return False
    try:
        source = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        os.close(fd)
        raise
    try:
        _copy(source, fd, num_bytes)
    finally:
        os.close(source)
        os.close(fd)
    return True


def _open_shared(staging: weights_pb2.SharedStaging, num_bytes: int) -> int | None:
    path = Path(staging.path)
    # Only plain files under /dev/shm, by a path without links or dots, are ever written to.
    if SHM not in path.parents or path.resolve() != path or not staging.nonce:
        return None
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    facts = os.fstat(fd)
    is_it = stat.S_ISREG(facts.st_mode) and facts.st_size == num_bytes
    if is_it and hmac.compare_digest(os.pread(fd, len(staging.nonce), 0), staging.nonce):
        return fd
    os.close(fd)
    return None


def _copy(source: int, target: int, num_bytes: int) -> None:
    shares = [part for share in _shares([(0, num_bytes)], _COPY_THREADS) for part in share]
    if num_bytes <= _ONE_STREAM_BYTES:
        _copy_range(source, target, 0, num_bytes)
        return
    with ThreadPoolExecutor(_COPY_THREADS, thread_name_prefix="copy") as pool:
        list(pool.map(lambda share: _copy_range(source, target, *share), shares))


def _copy_range(source: int, target: int, begin: int, end: int) -> None:
    """In the kernel where the file systems let it: no mapping to fault in, no copy through this process."""
    while begin < end:
        try:
            count = os.copy_file_range(source, target, end - begin, begin, begin)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            count = os.pwrite(target, os.pread(source, min(CHUNK_BYTES, end - begin), begin), begin)
        if count == 0:
            raise DataLossError(f"the image ends at byte {begin}; {end} were promised", reason="TRUNCATED")
        begin += count


def _chunks(image: Path, update_id: str, ranges: Sequence[Range]) -> Iterator[weights_pb2.UploadWeightsRequest]:
    """The messages of a stream, for gRPC's own thread; the first names the update, even if none follows."""
    yield weights_pb2.UploadWeightsRequest(update_id=update_id)
    with image.open("rb", buffering=0) as file:
        for begin, end in ranges:
            while begin < end:
                data = os.pread(file.fileno(), min(CHUNK_BYTES, end - begin), begin)
                if not data:
                    raise DataLossError(f"the image ends at byte {begin}; {end} were promised", reason="TRUNCATED")
                yield weights_pb2.UploadWeightsRequest(offset=begin, data=data, xxh3=xxhash.xxh3_64_intdigest(data))
                begin += len(data)


def _shares(ranges: Sequence[Range], count: int) -> list[list[Range]]:
    """The ranges cut into `count` lists of about equal length; at least one, perhaps empty."""
    per_share = max(1, -(-_length(ranges) // count))
    shares: list[list[Range]] = [[]]
    room = per_share
    for begin, end in ranges:
        while begin < end:
            if room == 0:
                shares.append([])
                room = per_share
            cut = min(end, begin + room)
            shares[-1].append((begin, cut))
            room -= cut - begin
            begin = cut
    return shares


def _missing(update: weights_pb2.WeightUpdate, num_bytes: int) -> list[Range]:
    return RangeSet((part.begin, part.end) for part in update.received).missing(num_bytes)


def _length(ranges: Sequence[Range]) -> int:
    return sum(end - begin for begin, end in ranges)


async def _done(call: Any) -> None:
    """Waits for a call of gRPC's threaded interface. Raises its error as a SurogateError."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def wake(_call: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(done.set)

    call.add_done_callback(wake)
    await done.wait()
    error = call.exception()
    if isinstance(error, grpc.RpcError):
        raise from_rpc_error(error) from error
    if error is not None and not isinstance(error, SurogateError):
        raise InternalError(f"the upload failed: {error}") from error
