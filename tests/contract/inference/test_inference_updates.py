"""Weight updates of a replica over a fake engine: what is refused when it is announced, and what a commit does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from inference_svc.replica import UPDATES_NAME, Replica
from inference_svc.service import NAME
from inference_svc.settings import InferenceSettings
from surogate import errors
from surogate.rpc.health import is_serving
from surogate.rpc.server import RpcServer
from surogate.v1 import inference_pb2, inference_pb2_grpc, weights_pb2, weights_pb2_grpc
from surogate.weights.manifest import build_manifest
from tests.helpers.fake_engine import EMBEDDING, LAYER, FakeEngine, fake_files
from tests.helpers.inference import chunks
from tests.helpers.rpc import connected

LORA, FULL, DELTA = weights_pb2.WEIGHT_KIND_LORA, weights_pb2.WEIGHT_KIND_FULL, weights_pb2.WEIGHT_KIND_DELTA
BASE = weights_pb2.WEIGHT_KIND_BASE
A, B = f"base_model.model.{LAYER}.lora_A.weight", f"base_model.model.{LAYER}.lora_B.weight"


class Pusher:
    """Pushes tensors to a replica."""

    def __init__(self, channel: Any, engine: FakeEngine, staging: Any, folder: Path) -> None:
        self.channel, self.engine, self.staging = channel, engine, staging
        self.stub: Any = weights_pb2_grpc.WeightUpdateServiceStub(channel)
        self._image = folder / "image.safetensors"

    def manifest(
        self, version: int, kind: weights_pb2.WeightKind, shapes: dict[str, tuple[int, ...]], **fields: Any
    ) -> weights_pb2.WeightManifest:
        save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, self._image)
        base_id = fields.pop("base_id", "")
        manifest = build_manifest(self._image, version=version, kind=kind, **fields)
        manifest.base_id = base_id
        return manifest

    async def create(self, manifest: weights_pb2.WeightManifest, update_id: str = "") -> None:
        update_id = update_id or f"v{manifest.version}"
        request = weights_pb2.CreateWeightUpdateRequest(update_id=update_id, manifest=manifest)
        await self.stub.CreateWeightUpdate(request)

    async def push(self, manifest: weights_pb2.WeightManifest, update_id: str = "") -> weights_pb2.WeightUpdate:
        update_id = update_id or f"v{manifest.version}"
        await self.create(manifest, update_id)
        await self.stub.UploadWeights(chunks(update_id, self._image.read_bytes()))
        return await self.stub.CommitWeightUpdate(weights_pb2.CommitWeightUpdateRequest(update_id=update_id))

    async def generate(self) -> inference_pb2.GenerateRolloutsResponse:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)
        return await stub.GenerateRollouts(inference_pb2.GenerateRolloutsRequest(prompt_token_ids=[1], n=1))

    async def served(self) -> inference_pb2.ServedModel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)
        return await stub.GetServedModel(inference_pb2.GetServedModelRequest())

    async def serving(self) -> bool:
        return await is_serving(self.channel, NAME)


@asynccontextmanager
async def pushing(folder: Path, **settings: Any) -> AsyncIterator[Pusher]:
    engine, replicas, chosen = FakeEngine(), [], InferenceSettings(**settings)

    def register(server: RpcServer) -> None:
        replicas.append(Replica(server, chosen))
        replicas[0].attach(engine, fake_files(folder))

    async with connected(register, chosen) as channel:
        try:
            yield Pusher(channel, engine, replicas[0].staging, folder)
        finally:
            replicas[0].staging.close()


def config(rank: int = 4, **more: Any) -> str:
    return json.dumps({"r": rank, "lora_alpha": 8, "target_modules": ["o_proj"], **more})


ADAPTER = {A: (4, 16), B: (16, 4)}
MODEL = {EMBEDDING: (100, 16), f"{LAYER}.weight": (16, 16)}


async def test_an_adapter_is_committed_as_a_peft_directory_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with pushing(tmp_path) as pusher:
        update = await pusher.push(pusher.manifest(1, LORA, ADAPTER, adapter_config_json=config()))
        assert update.state == weights_pb2.WeightUpdate.STATE_COMMITTED
        assert update.pause.ToTimedelta().total_seconds() == pytest.approx(0.01)
        assert pusher.engine.adapters == [{"adapter_model.safetensors", "adapter_config.json"}]
        assert (await pusher.generate()).completions[0].policy_spans[0].policy_version == 1
        assert not [*pusher.staging.directory.glob("*safetensors*"), *pusher.staging.directory.glob("adapter*")]


@pytest.mark.parametrize(
    ("shapes", "adapter_config", "message"),
    [
        ({A: (16, 16), B: (16, 16)}, config(16), "max_lora_rank.*rank 16.*takes 8"),
        (ADAPTER, config(4, rank_pattern={"o_proj": 12}), "max_lora_rank.*rank 12"),
        ({A: (4, 15), B: (16, 4)}, config(), r"lora_A.weight: has shape \[4, 15\]; \[4, 16\]"),
        ({A: (4, 16), B: (17, 4)}, config(), r"lora_B.weight: has shape \[17, 4\]"),
        ({A: (4, 16)}, config(), "lora_B.weight: is missing"),
        ({A: (4, 16), B: (16, 3)}, config(), r"lora_B.weight: has shape \[16, 3\]"),
        ({A.replace("o_proj", "x"): (4, 16), B.replace("o_proj", "x"): (16, 4)}, config(), "no linear layer"),
        ({"lora": (4, 16)}, config(), "is not a LoRA tensor"),
        (ADAPTER, config(use_dora=True), "adapter_config.use_dora"),
        (ADAPTER, config(bias="all"), "adapter_config.bias"),
        (ADAPTER, "{}", "adapter_config_json"),
    ],
)
async def test_an_adapter_that_does_not_fit_is_refused_by_name(
    shapes: dict[str, tuple[int, ...]], adapter_config: str, message: str, tmp_path: Path
) -> None:
    async with pushing(tmp_path) as pusher:
        with pytest.raises(errors.InvalidInputError, match=message):
            await pusher.create(pusher.manifest(1, LORA, shapes, adapter_config_json=adapter_config))
        assert (await pusher.generate()).completions[0].policy_spans[0].policy_version == 0


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({EMBEDDING: (100, 16)}, f"{LAYER}.weight: is missing"),
        ({**MODEL, EMBEDDING: (101, 16)}, r"has shape \[101, 16\]; \[100, 16\]"),
        ({**MODEL, "other": (1,)}, "other: the model has no such tensor"),
    ],
)
async def test_full_weights_must_be_the_models(
    shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    async with pushing(tmp_path) as pusher:
        with pytest.raises(errors.InvalidInputError, match=message):
            await pusher.create(pusher.manifest(1, FULL, shapes))


async def test_a_tied_output_head_may_come_or_not(tmp_path: Path) -> None:
    async with pushing(tmp_path) as pusher:
        await pusher.push(pusher.manifest(1, FULL, MODEL))
        await pusher.push(pusher.manifest(2, FULL, {**MODEL, "lm_head.weight": (100, 16)}))
        assert pusher.engine.policy_version == 2


CHANGE = {f"{LAYER}.weight": (16, 16)}


async def test_deltas_build_on_the_checkpoint_and_on_each_other(tmp_path: Path) -> None:
    async with pushing(tmp_path, delta_updates=True) as pusher:
        await pusher.push(pusher.manifest(1, DELTA, CHANGE))
        await pusher.push(pusher.manifest(2, DELTA, CHANGE, base_version=1))

    first, second = pusher.engine.images
    assert first[1:] == [tmp_path / "model.safetensors"]
    assert [file.name for file in second[1:]] == ["kept-1.safetensors", "model.safetensors"]


@pytest.mark.parametrize("kind", [FULL, DELTA])
@pytest.mark.parametrize("kept", [False, True])
async def test_a_delta_needs_the_image_that_it_builds_on(
    kept: bool, kind: weights_pb2.WeightKind, tmp_path: Path
) -> None:
    async with pushing(tmp_path, delta_updates=kept) as pusher:
        await pusher.push(pusher.manifest(1, kind, MODEL))
        delta = pusher.manifest(2, DELTA, CHANGE, base_version=1)
        if kept:
            await pusher.push(delta)
            assert pusher.engine.images[1][1].name == "kept-1.safetensors"
        else:
            with pytest.raises(errors.FailedPreconditionError, match="--delta-updates"):
                await pusher.create(delta)


async def test_a_delta_on_the_model_as_loaded_is_taken_whatever_serves_and_nothing_of_it_is_kept(
    tmp_path: Path,
) -> None:
    async with pushing(tmp_path) as pusher:
        await pusher.push(pusher.manifest(1, LORA, ADAPTER, adapter_config_json=config()))
        for version, kind in ((2, DELTA), (5, DELTA), (6, FULL), (7, DELTA)):
            await pusher.push(pusher.manifest(version, kind, CHANGE if kind == DELTA else MODEL))
            served = await pusher.served()
            assert (served.policy_version, served.adapter) == (version, "")
        pusher.engine.fail_swap = True
        with pytest.raises(errors.InternalError, match="told to fail"):
            await pusher.push(pusher.manifest(8, DELTA, CHANGE))
        assert not await pusher.serving()
        await pusher.push(pusher.manifest(8, DELTA, CHANGE), "again")
        assert await pusher.serving()
        below = [images[1:] for images in pusher.engine.images]
        assert [len(files) for files in below] == [1, 1, 0, *[1] * (len(below) - 3)]
        assert all(files == [tmp_path / "model.safetensors"] for files in below if files)
        assert not [*pusher.staging.directory.glob("*safetensors*")]
        with pytest.raises(errors.FailedPreconditionError, match="an adapter needs the model as loaded"):
            await pusher.create(pusher.manifest(9, LORA, ADAPTER, adapter_config_json=config()))


async def test_a_delta_that_brings_a_base_with_it_stands_for_that_base_and_takes_no_adapter(tmp_path: Path) -> None:
    async with pushing(tmp_path) as pusher:
        await pusher.push(pusher.manifest(0, BASE, MODEL, base_id="job-1"))
        await pusher.push(pusher.manifest(1, DELTA, CHANGE, base_id="job-1"))
        served = await pusher.served()
        assert (served.policy_version, served.base_id) == (1, "job-1")
        with pytest.raises(errors.FailedPreconditionError) as refused:
            await pusher.create(pusher.manifest(2, LORA, ADAPTER, adapter_config_json=config(), base_id="job-1"))
        assert refused.value.reason == "BASE_REPLACED"


async def test_an_adapter_is_refused_once_the_base_was_replaced(tmp_path: Path) -> None:
    async with pushing(tmp_path) as pusher:
        await pusher.push(pusher.manifest(1, FULL, MODEL))
        with pytest.raises(errors.FailedPreconditionError, match="an adapter needs the model as loaded"):
            await pusher.create(pusher.manifest(2, LORA, ADAPTER, adapter_config_json=config()))


async def test_a_failed_commit_is_not_served_until_the_next_one_succeeds(tmp_path: Path) -> None:
    async with pushing(tmp_path) as pusher:
        assert await pusher.serving()
        pusher.engine.fail_swap = True
        with pytest.raises(errors.InternalError, match="told to fail"):
            await pusher.push(pusher.manifest(1, FULL, MODEL))
        assert not await pusher.serving()

        await pusher.push(pusher.manifest(2, FULL, MODEL))
        assert await pusher.serving()
        assert (await pusher.generate()).completions[0].policy_spans[0].policy_version == 2


@pytest.mark.parametrize(("given", "served"), [("", "policy"), ("mine", "mine")])
async def test_the_served_adapter_has_the_name_that_was_pushed(tmp_path: Path, given: str, served: str) -> None:
    async with pushing(tmp_path) as pusher:
        assert (await pusher.served()).adapter == ""
        manifest = pusher.manifest(1, LORA, ADAPTER, adapter_config_json=config())
        manifest.adapter_name = given
        await pusher.push(manifest)
        assert (await pusher.served()).adapter == served
        await pusher.push(pusher.manifest(2, FULL, MODEL))
        assert (await pusher.served()).adapter == ""


async def test_adapters_are_added_to_the_base_that_was_pushed_and_to_no_other(tmp_path: Path) -> None:
    async with pushing(tmp_path) as pusher:
        adapter = pusher.manifest(1, LORA, ADAPTER, adapter_config_json=config(), base_id="job-1")
        with pytest.raises(errors.FailedPreconditionError, match="push that base first") as refused:
            await pusher.create(adapter)
        assert refused.value.reason == "OTHER_BASE"
        await pusher.push(pusher.manifest(0, BASE, MODEL, base_id="job-1"))
        served = await pusher.served()
        assert (served.policy_version, served.base_id, served.adapter) == (0, "job-1", "")
        with pytest.raises(errors.FailedPreconditionError, match="fits the model as loaded, and the base job-1"):
            await pusher.create(pusher.manifest(1, LORA, ADAPTER, adapter_config_json=config()))
        await pusher.push(pusher.manifest(1, LORA, ADAPTER, adapter_config_json=config(), base_id="job-1"))
        served = await pusher.served()
        assert (served.policy_version, served.base_id, served.adapter) == (1, "job-1", "policy")
        with pytest.raises(errors.FailedPreconditionError, match="a base comes before all versions"):
            await pusher.create(pusher.manifest(0, BASE, MODEL, base_id="job-2"), "another")


async def test_a_base_has_a_name_version_0_and_every_tensor(tmp_path: Path) -> None:
    async with pushing(tmp_path) as pusher:
        with pytest.raises(errors.InvalidInputError, match=r"manifest\.base_id: must name the base"):
            await pusher.create(pusher.manifest(0, BASE, MODEL))
        with pytest.raises(errors.InvalidInputError, match=r"manifest\.version: must be 0 for BASE"):
            await pusher.create(pusher.manifest(1, BASE, MODEL, base_id="a"))
        with pytest.raises(errors.InvalidInputError, match="is missing"):
            await pusher.create(pusher.manifest(0, BASE, {EMBEDDING: (100, 16)}, base_id="a"))


async def test_after_a_base_that_could_not_be_loaded_no_adapter_is_taken(tmp_path: Path) -> None:
    async with pushing(tmp_path) as pusher:
        await pusher.push(pusher.manifest(0, BASE, MODEL, base_id="a"))
        pusher.engine.fail_swap = True
        with pytest.raises(errors.InternalError, match="told to fail"):
            await pusher.push(pusher.manifest(0, BASE, MODEL, base_id="b"), "again")
        assert not await pusher.serving()
        with pytest.raises(errors.FailedPreconditionError) as refused:
            await pusher.create(pusher.manifest(1, LORA, ADAPTER, adapter_config_json=config(), base_id="a"))
        assert refused.value.reason == "BASE_REPLACED"


async def test_a_replica_that_awaits_its_weights_serves_when_they_are_there(tmp_path: Path) -> None:
    async with pushing(tmp_path, await_weights=True) as pusher:
        assert await is_serving(pusher.channel, UPDATES_NAME), "it can be given weights"
        assert not await pusher.serving()
        await pusher.push(pusher.manifest(0, BASE, MODEL, base_id="a"))
        assert not await pusher.serving(), "the adapter is yet to come"
        await pusher.push(pusher.manifest(3, LORA, ADAPTER, adapter_config_json=config(), base_id="a"))
        assert await pusher.serving()


async def test_a_replica_that_awaits_its_weights_is_told_that_it_has_them(tmp_path: Path) -> None:
    async with pushing(tmp_path, await_weights=True) as pusher:
        with pytest.raises(errors.FailedPreconditionError, match="version 0 is served, not 2"):
            await pusher.stub.ConfirmWeights(weights_pb2.ConfirmWeightsRequest(version=2))
        assert not await pusher.serving()
        await pusher.stub.ConfirmWeights(weights_pb2.ConfirmWeightsRequest(version=0))
        assert await pusher.serving()
