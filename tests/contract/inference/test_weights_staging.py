"""WeightUpdateService call by call: the life of an update on one replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import xxhash

from surogate.errors import (
    AlreadyExistsError,
    BusyError,
    DataLossError,
    FailedPreconditionError,
    InvalidInputError,
    NotFoundError,
    OutOfRangeError,
)
from surogate.v1 import weights_pb2 as pb
from surogate.v1 import weights_pb2_grpc
from tests.helpers.rpc import connected
from tests.helpers.waiting import until
from tests.helpers.weight_images import FakeReplica, make_image, replica

State = pb.WeightUpdate


class Caller:
    """The five methods, briefly."""

    def __init__(self, stub: Any) -> None:
        self.stub = stub

    async def create(self, update_id: str, manifest: pb.WeightManifest) -> pb.WeightUpdate:
        return await self.stub.CreateWeightUpdate(pb.CreateWeightUpdateRequest(update_id=update_id, manifest=manifest))

    async def upload(self, update_id: str, chunks: Iterable[tuple[int, bytes]]) -> pb.WeightUpdate:
        async def stream() -> AsyncIterator[pb.UploadWeightsRequest]:
            yield pb.UploadWeightsRequest(update_id=update_id)
            for offset, data in chunks:
                yield pb.UploadWeightsRequest(offset=offset, data=data, xxh3=xxhash.xxh3_64_intdigest(data))

        return await self.stub.UploadWeights(stream())

    async def get(self, update_id: str) -> pb.WeightUpdate:
        return await self.stub.GetWeightUpdate(pb.GetWeightUpdateRequest(update_id=update_id))

    async def commit(self, update_id: str) -> pb.WeightUpdate:
        return await self.stub.CommitWeightUpdate(pb.CommitWeightUpdateRequest(update_id=update_id))

    async def abort(self, update_id: str) -> None:
        await self.stub.AbortWeightUpdate(pb.AbortWeightUpdateRequest(update_id=update_id))


@asynccontextmanager
async def started(root: Path, **options: Any) -> AsyncIterator[tuple[FakeReplica, Caller]]:
    with replica(root, **options) as fake:
        async with connected(fake.register) as channel:
            yield fake, Caller(weights_pb2_grpc.WeightUpdateServiceStub(channel))


async def test_created_uploaded_in_any_order_and_committed(tmp_path: Path) -> None:
    image = tmp_path / "image"
    manifest = make_image(image)
    data = image.read_bytes()
    async with started(tmp_path) as (fake, call):
        created = await call.create("u", manifest)
        assert created.state == State.STATE_UPLOADING
        assert created.shared_staging.path.startswith(str(fake.staging.directory))
        half = await call.upload("u", [(500, data[500:])])
        assert half.state == State.STATE_UPLOADING
        assert [(part.begin, part.end) for part in half.received] == [(500, len(data))]
        staged = await call.upload("u", [(0, data[:300]), (300, data[300:500])])
        assert staged.state == State.STATE_STAGED
        committed = await call.commit("u")
        again = await call.commit("u")
    assert committed.state == again.state == State.STATE_COMMITTED
    assert committed.pause.ToTimedelta().total_seconds() == 0.005
    assert (fake.commits, fake.served) == (1, data)


async def test_a_repeated_create_returns_the_update_as_it_is(tmp_path: Path) -> None:
    image = tmp_path / "image"
    manifest = make_image(image)
    async with started(tmp_path) as (_, call):
        await call.create("u", manifest)
        await call.upload("u", [(0, image.read_bytes()[:100])])
        again = await call.create("u", manifest)
        assert [(part.begin, part.end) for part in again.received] == [(0, 100)]
        with pytest.raises(AlreadyExistsError):
            await call.create("u", make_image(image, seed=1))


async def test_another_update_replaces_one_that_is_not_committed(tmp_path: Path) -> None:
    image = tmp_path / "image"
    manifest = make_image(image)
    async with started(tmp_path) as (fake, call):
        await call.create("first", manifest)
        await call.create("second", manifest)
        assert (await call.get("first")).state == State.STATE_ABORTED
        with pytest.raises(FailedPreconditionError, match="ABORTED"):
            await call.upload("first", [(0, image.read_bytes())])
        assert len(list(fake.staging.directory.glob("*.safetensors"))) == 1


async def test_wrong_chunks_are_refused_and_can_be_sent_again(tmp_path: Path) -> None:
    image = tmp_path / "image"
    manifest = make_image(image)
    data = image.read_bytes()
    async with started(tmp_path) as (_, call):
        await call.create("u", manifest)

        async def wrong() -> AsyncIterator[pb.UploadWeightsRequest]:
            yield pb.UploadWeightsRequest(update_id="u", offset=0, data=data, xxh3=1)

        with pytest.raises(DataLossError, match="byte 0"):
            await call.stub.UploadWeights(wrong())
        for offset in (-1, 1, 10**12):
            with pytest.raises(OutOfRangeError, match="outside the image"):
                await call.upload("u", [(offset, data)])
        with pytest.raises(NotFoundError):
            await call.upload("other", [])
        assert (await call.upload("u", [(0, data)])).state == State.STATE_STAGED


async def test_a_tensor_with_a_wrong_checksum_can_be_sent_again(tmp_path: Path) -> None:
    image = tmp_path / "image"
    manifest = make_image(image)
    data = image.read_bytes()
    spec = manifest.tensors[1]
    spoilt = data[: spec.offset] + bytes(spec.num_bytes) + data[spec.offset + spec.num_bytes :]
    async with started(tmp_path) as (_, call):
        await call.create("u", manifest)
        with pytest.raises(DataLossError, match=r"layer\.1"):
            await call.upload("u", [(0, spoilt)])
        missing = [(part.begin, part.end) for part in (await call.get("u")).received]
        assert missing == [(0, spec.offset), (spec.offset + spec.num_bytes, len(data))]
        sent = await call.upload("u", [(spec.offset, data[spec.offset : spec.offset + spec.num_bytes])])
        assert sent.state == State.STATE_STAGED


async def test_a_header_that_disagrees_ends_the_update(tmp_path: Path) -> None:
    image = tmp_path / "image"
    manifest = make_image(image, sizes=(4, 4))
    manifest.tensors[0].name, manifest.tensors[1].name = "layer.1", "layer.0"
    async with started(tmp_path) as (_, call):
        await call.create("u", manifest)
        with pytest.raises(DataLossError, match="header"):
            await call.upload("u", [(0, image.read_bytes())])
        assert (await call.get("u")).state == State.STATE_ABORTED


async def test_versions_only_go_up(tmp_path: Path) -> None:
    image = tmp_path / "image"
    manifest = make_image(image, version=5)
    async with started(tmp_path) as (_, call):
        await call.create("u", manifest)
        await call.upload("u", [(0, image.read_bytes())])
        await call.commit("u")
        for version in (4, 5):
            with pytest.raises(FailedPreconditionError, match="not newer") as caught:
                await call.create("other", make_image(image, version=version))
            assert caught.value.metadata == {"served": "5"}
        assert (await call.create("other", make_image(image, version=6))).state == State.STATE_UPLOADING


async def test_a_delta_needs_the_version_that_it_builds_on(tmp_path: Path) -> None:
    image = tmp_path / "image"
    manifest = make_image(image, version=2, kind=pb.WEIGHT_KIND_DELTA, base_version=1)
    async with started(tmp_path) as (_, call):
        with pytest.raises(FailedPreconditionError, match="builds on version 1") as caught:
            await call.create("u", manifest)
    assert caught.value.reason == "WRONG_BASE_VERSION"


async def test_a_failed_commit_is_failed_and_the_same_version_can_be_pushed_again(tmp_path: Path) -> None:
    image = tmp_path / "image"
    manifest = make_image(image, version=1)
    async with started(tmp_path) as (fake, call):
        fake.fail = BusyError("no memory for the swap")
        await call.create("u", manifest)
        await call.upload("u", [(0, image.read_bytes())])
        with pytest.raises(BusyError, match="no memory"):
            await call.commit("u")
        assert (await call.get("u")).state == State.STATE_FAILED
        assert fake.staging.served_version == 0
        fake.fail = None
        await call.create("again", manifest)
        await call.upload("again", [(0, image.read_bytes())])
        assert (await call.commit("again")).state == State.STATE_COMMITTED


async def test_a_commit_goes_on_when_its_caller_leaves(tmp_path: Path) -> None:
    image = tmp_path / "image"
    manifest = make_image(image)
    async with started(tmp_path) as (fake, call):
        fake.gate.clear()
        await call.create("u", manifest)
        await call.upload("u", [(0, image.read_bytes())])
        first = asyncio.create_task(call.commit("u"))
        await fake.swapping.wait()
        first.cancel()
        with pytest.raises(FailedPreconditionError):
            await call.abort("u")
        with pytest.raises(BusyError):
            await call.create("other", make_image(tmp_path / "other", version=2))
        fake.gate.set()
        assert (await call.commit("u")).state == State.STATE_COMMITTED
    assert fake.commits == 1


async def test_only_what_is_staged_can_be_committed(tmp_path: Path) -> None:
    async with started(tmp_path) as (_, call):
        await call.create("u", make_image(tmp_path / "image"))
        with pytest.raises(FailedPreconditionError, match="UPLOADING, not STAGED"):
            await call.commit("u")
        with pytest.raises(NotFoundError):
            await call.commit("unknown")


async def test_abort_drops_and_may_be_repeated(tmp_path: Path) -> None:
    async with started(tmp_path) as (fake, call):
        await call.create("u", make_image(tmp_path / "image"))
        await call.abort("u")
        await call.abort("u")
        await call.abort("unknown")
        assert (await call.get("u")).state == State.STATE_ABORTED
        assert list(fake.staging.directory.glob("*.safetensors")) == []


async def test_an_update_to_which_nothing_arrives_expires(tmp_path: Path) -> None:
    async with started(tmp_path, ttl=0.2) as (_, call):
        created = await call.create("u", make_image(tmp_path / "image"))
        assert created.expire_time.ToNanoseconds() > 0

        async def aborted() -> bool:
            return (await call.get("u")).state == State.STATE_ABORTED

        await until(aborted)


@pytest.mark.parametrize("update_id", ["", "a/b", "x" * 129])
async def test_ids_are_checked(tmp_path: Path, update_id: str) -> None:
    async with started(tmp_path) as (_, call):
        with pytest.raises(InvalidInputError, match="update_id"):
            await call.create(update_id, make_image(tmp_path / "image"))


async def test_an_image_without_room_is_refused_at_once(tmp_path: Path) -> None:
    manifest = make_image(tmp_path / "image")
    manifest.num_bytes = 1 << 50
    async with started(tmp_path) as (_, call):
        with pytest.raises(BusyError, match="bytes of memory"):
            await call.create("u", manifest)
