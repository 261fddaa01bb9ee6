"""A push end to end: to one replica and several, over gRPC and shared memory, whole, cut, wrong, and failing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from surogate.errors import DataLossError, FailedPreconditionError, InternalError, InvalidInputError, UnavailableError
from surogate.rpc.channel import ClientSecurity
from surogate.v1 import weights_pb2
from surogate.weights import transports
from surogate.weights.memory import SHM
from surogate.weights.push import push
from tests.helpers.proxy import cutting
from tests.helpers.rpc import serving
from tests.helpers.weight_images import FakeReplica, make_image, replica

LARGE = (3_000_000, 1_000_000, 1)
"""Sizes of an image of 16 MB, which goes in two streams of many chunks."""


@asynccontextmanager
async def replicas(count: int, root: Path) -> AsyncIterator[tuple[list[FakeReplica], list[str]]]:
    async with AsyncExitStack() as stack:
        fakes = [stack.enter_context(replica(root)) for _ in range(count)]
        servers = [await stack.enter_async_context(serving(fake.register)) for fake in fakes]
        yield fakes, [server.address for server in servers]


@pytest.mark.parametrize("sizes", [(1, 2), LARGE])
@pytest.mark.parametrize(("shared_memory", "transport"), [(True, "shared_memory"), (False, "grpc")])
async def test_all_replicas_serve_what_was_pushed(
    tmp_path: Path, sizes: tuple[int, ...], shared_memory: bool, transport: str
) -> None:
    image = tmp_path / "image.safetensors"
    manifest = make_image(image, version=3, sizes=sizes)
    async with replicas(2, SHM) as (fakes, targets):
        report = await push(image, manifest, targets, ClientSecurity(), version=3, shared_memory=shared_memory)
        left = [path.name for fake in fakes for path in fake.staging.directory.iterdir()]
    assert [fake.served == image.read_bytes() for fake in fakes] == [True, True]
    assert [fake.staging.served_version for fake in fakes] == [3, 3]
    assert {one.transport for one in report.replicas} == {transport}
    assert (report.errors, report.num_bytes, report.pause_seconds) == ({}, manifest.num_bytes, 0.005)
    assert left == ["lock", "lock"], "images are removed once they are loaded"


async def test_a_folder_in_memory_that_is_not_ours_to_reach_means_grpc(tmp_path: Path) -> None:
    image = tmp_path / "image.safetensors"
    manifest = make_image(image)
    async with replicas(1, tmp_path) as (fakes, targets):
        report = await push(image, manifest, targets, ClientSecurity())
    assert report.replicas[0].transport == "grpc"
    assert fakes[0].served == image.read_bytes()


async def test_an_upload_that_is_cut_goes_on_from_what_arrived(tmp_path: Path) -> None:
    image = tmp_path / "image.safetensors"
    manifest = make_image(image, sizes=LARGE)
    written: list[int] = []
    with replica(tmp_path) as fake:
        take = fake.staging.write

        async def counting(update: object, offset: int, data: bytes, xxh3: int) -> None:
            await take(update, offset, data, xxh3)  # type: ignore[arg-type]
            written.append(len(data))

        fake.staging.write = counting  # type: ignore[method-assign,assignment]
        async with serving(fake.register) as server, cutting(server.address) as proxy:
            proxy.budget = manifest.num_bytes // 2
            await push(image, manifest, [proxy.address], ClientSecurity(), shared_memory=False)
    assert proxy.cuts == 1
    assert fake.served == image.read_bytes()
    assert sum(written) < 1.4 * manifest.num_bytes, "what had arrived is not sent again"


async def test_an_image_that_is_not_what_its_manifest_says_is_never_committed(tmp_path: Path) -> None:
    image = tmp_path / "image.safetensors"
    manifest = make_image(image)
    manifest.tensors[1].xxh3 += 1
    for shared_memory in (True, False):
        async with replicas(2, SHM) as (fakes, targets):
            with pytest.raises(DataLossError, match=r"layer\.1") as caught:
                await push(image, manifest, targets, ClientSecurity(), shared_memory=shared_memory)
        assert caught.value.reason == "CHECKSUM"
        assert [fake.commits for fake in fakes] == [0, 0]


async def test_a_shape_that_the_model_does_not_have_is_refused_before_the_upload(tmp_path: Path) -> None:
    def check(manifest: weights_pb2.WeightManifest) -> None:
        if list(manifest.tensors[0].shape) != [65]:
            raise InvalidInputError("layer.0: has shape [64]; [65] is expected", reason="UPDATE_DOES_NOT_FIT")

    image = tmp_path / "image.safetensors"
    manifest = make_image(image)
    with replica(tmp_path, check=check) as fake:
        async with serving(fake.register) as server:
            with pytest.raises(InvalidInputError, match=r"\[65\] is expected") as caught:
                await push(image, manifest, [server.address], ClientSecurity())
    assert caught.value.reason == "UPDATE_DOES_NOT_FIT"
    assert caught.value.metadata[server.address] == "layer.0: has shape [64]; [65] is expected"


@pytest.mark.parametrize("shared_memory", [True, False])
async def test_if_one_replica_cannot_stage_none_commits(tmp_path: Path, shared_memory: bool) -> None:
    image = tmp_path / "image.safetensors"
    async with replicas(2, SHM) as (fakes, targets):
        first = make_image(image, version=1)
        await push(image, first, targets, ClientSecurity())
        old = image.read_bytes()
        fakes[1].staging.served_version = 9
        second = make_image(image, version=2, seed=1)
        with pytest.raises(FailedPreconditionError, match="not newer than version 9") as caught:
            await push(image, second, targets, ClientSecurity(), shared_memory=shared_memory)
        assert "old version serves everywhere" in caught.value.message
        assert list(caught.value.metadata) == ["served", targets[1]]
        assert [fake.served for fake in fakes] == [old, old]
        left = [path.name for fake in fakes for path in fake.staging.directory.iterdir()]
    assert left == ["lock", "lock"], "what was staged is dropped"


async def test_if_one_replica_is_gone_none_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "_MAX_STALLS", 0)
    image = tmp_path / "image.safetensors"
    manifest = make_image(image)
    async with replicas(1, tmp_path) as (fakes, targets):
        with pytest.raises(UnavailableError, match=r"1 of 2 replicas.*127\.0\.0\.1:9"):
            await push(image, manifest, [*targets, "127.0.0.1:9"], ClientSecurity())
    assert fakes[0].commits == 0


async def test_a_replica_that_fails_its_commit_is_reported_and_the_others_serve(tmp_path: Path) -> None:
    image = tmp_path / "image.safetensors"
    manifest = make_image(image)
    async with replicas(2, tmp_path) as (fakes, targets):
        fakes[0].fail = RuntimeError("the engine refused")
        report = await push(image, manifest, targets, ClientSecurity())
        assert fakes[1].served == image.read_bytes()
        (failed,) = report.errors
        assert failed == targets[0]
        assert isinstance(report.errors[failed], InternalError)
        assert "the engine refused" in report.errors[failed].message

        fakes[0].fail = None
        again = await push(image, manifest, [targets[0]], ClientSecurity())
    assert again.errors == {}
    assert fakes[0].served == image.read_bytes()


async def test_a_repeated_push_commits_once(tmp_path: Path) -> None:
    image = tmp_path / "image.safetensors"
    manifest = make_image(image)
    async with replicas(2, tmp_path) as (fakes, targets):
        await push(image, manifest, targets[:1], ClientSecurity(), update_id="session-v1")
        report = await push(image, manifest, targets, ClientSecurity(), update_id="session-v1")
    assert report.errors == {}
    assert [fake.commits for fake in fakes] == [1, 1]


async def test_a_push_that_is_cancelled_leaves_the_old_version(tmp_path: Path) -> None:
    image = tmp_path / "image.safetensors"
    manifest = make_image(image, sizes=LARGE)
    async with replicas(1, tmp_path) as (fakes, targets):
        hold = asyncio.Event()

        async def stuck(*_: object) -> None:
            hold.set()
            await asyncio.Event().wait()

        fakes[0].staging.write = stuck  # type: ignore[method-assign,assignment]
        task = asyncio.create_task(push(image, manifest, targets, ClientSecurity()))
        await hold.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert fakes[0].commits == 0
        assert [path.name for path in fakes[0].staging.directory.iterdir()] == ["lock"]


async def test_what_is_given_is_checked(tmp_path: Path) -> None:
    image = tmp_path / "image.safetensors"
    manifest = make_image(image)
    for targets in ([], ["a:1", "a:1"]):
        with pytest.raises(InvalidInputError, match="targets"):
            await push(image, manifest, targets, ClientSecurity())
    with pytest.raises(InvalidInputError, match="version 2"):
        await push(image, manifest, ["a:1"], ClientSecurity(), version=2)
    image.write_bytes(b"short")
    with pytest.raises(InternalError, match="its manifest says"):
        await push(image, manifest, ["a:1"], ClientSecurity())
