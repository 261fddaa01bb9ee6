"""An inference service as a real process, pushes to it, and logprobs by transformers and PEFT to compare with."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import xxhash

from surogate.process import ServiceProcess, start_service
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.rpc.health import wait_serving
from surogate.v1 import (
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    weights_pb2,
    weights_pb2_grpc,
)
from surogate.weights.manifest import build_manifest

INFERENCE = "surogate.v1.InferenceService"
TOKEN = "test-token"
START_SECONDS = 600.0


@dataclass
class Replica:
    """A served model, with stubs of its two services."""

    process: ServiceProcess
    channel: grpc.aio.Channel

    @property
    def inference(self) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def weights(self) -> Any:
        return weights_pb2_grpc.WeightUpdateServiceStub(self.channel)

    async def served(self) -> inference_pb2.ServedModel:
        return await self.inference.GetServedModel(inference_pb2.GetServedModelRequest())

    async def generate(
        self, prompt: Sequence[int], n: int = 1, *, min_policy_version: int = 0, **sampling: Any
    ) -> inference_pb2.GenerateRolloutsResponse:
        return await self.inference.GenerateRollouts(
            inference_pb2.GenerateRolloutsRequest(
                prompt_token_ids=prompt,
                n=n,
                sampling=common_pb2.SamplingParams(**sampling),
                min_policy_version=min_policy_version,
            )
        )

    async def until_tokens_flow(self, prompt: Sequence[int]) -> None:
        """Returns while requests that were sent before are being generated: a later one has got tokens already."""
        request = inference_pb2.StreamGenerateRequest(
            tokens=inference_pb2.StreamGenerateRequest.TokenIds(ids=prompt),
            sampling=common_pb2.SamplingParams(max_tokens=20, min_tokens=20),
        )
        async for _ in self.inference.StreamGenerate(request):
            pass

    async def stage(self, update_id: str, manifest: weights_pb2.WeightManifest, image: Path) -> None:
        """Creates the update and uploads the image in one stream of small chunks."""
        await self.weights.CreateWeightUpdate(
            weights_pb2.CreateWeightUpdateRequest(update_id=update_id, manifest=manifest)
        )
        update = await self.weights.UploadWeights(chunks(update_id, image.read_bytes()))  # noqa: ASYNC240
        assert update.state == weights_pb2.WeightUpdate.STATE_STAGED

    async def commit(self, update_id: str) -> weights_pb2.WeightUpdate:
        return await self.weights.CommitWeightUpdate(weights_pb2.CommitWeightUpdateRequest(update_id=update_id))

    async def push(self, manifest: weights_pb2.WeightManifest, image: Path) -> weights_pb2.WeightUpdate:
        update_id = f"version-{manifest.version}"
        await self.stage(update_id, manifest, image)
        return await self.commit(update_id)


async def chunks(update_id: str, data: bytes, size: int = 1 << 16) -> AsyncIterator[weights_pb2.UploadWeightsRequest]:
    for offset in range(0, len(data), size):
        piece = data[offset : offset + size]
        yield weights_pb2.UploadWeightsRequest(
            update_id=update_id, offset=offset, data=piece, xxh3=xxhash.xxh3_64_intdigest(piece)
        )


@asynccontextmanager
async def replica(folder: Path, model: Path, *arguments: str, threads: int = 1) -> AsyncIterator[Replica]:
    """Serves `model` in float32 by a process of its own, ready when the block begins; its log is in `folder`."""
    process = await start_service(
        "inference_svc",
        ["--model", str(model), "--dtype", "float32", "--max-num-seqs", "32", *arguments],
        log_file=folder / "inference.log",
        token=TOKEN,
        environment={"OMP_NUM_THREADS": str(threads)},
    )
    try:
        async with open_channel(process.address, ClientSecurity(token=TOKEN)) as channel:
            await wait_serving(channel, INFERENCE, timeout=START_SECONDS)
            yield Replica(process, channel)
    finally:
        await process.stop(grace=60.0)


def adapter_manifest(directory: Path, version: int) -> tuple[weights_pb2.WeightManifest, Path]:
    """Manifest and image of a PEFT directory."""
    image = directory / "adapter_model.safetensors"
    config = json.dumps(json.loads((directory / "adapter_config.json").read_text()))
    kind = weights_pb2.WEIGHT_KIND_LORA
    return build_manifest(image, version=version, kind=kind, adapter_config_json=config), image


def full_manifest(directory: Path, version: int) -> tuple[weights_pb2.WeightManifest, Path]:
    """Manifest and image of a model directory with one file of weights."""
    image = directory / "model.safetensors"
    return build_manifest(image, version=version, kind=weights_pb2.WEIGHT_KIND_FULL), image


class Reference:
    """Logprobs of completions by transformers (and PEFT), the softmax in float64."""

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._model = (PeftModel.from_pretrained(loaded, adapter) if adapter else loaded).eval()

    def logprobs(
        self, prompt: Sequence[int], completion: Sequence[int], temperature: float, *, banned: Sequence[int] = ()
    ) -> list[float]:
        """Of each token of the completion; `banned` ids had no probability."""
        import torch

        with torch.no_grad():
            logits = self._model(torch.tensor([[*prompt, *completion]])).logits[0].double() / temperature
        logits[:, list(banned)] = -torch.inf
        logprobs = logits.log_softmax(-1)  # [tokens, vocabulary]
        return [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(completion)]


def largest_error(
    references: dict[int, Reference],
    prompt: Sequence[int],
    completion: inference_pb2.Completion,
    temperature: float,
    *,
    banned: Sequence[int] = (),
) -> float:
    """Largest distance of a completion's logprobs from those of the versions that its spans name."""
    assert sum(span.num_tokens for span in completion.policy_spans) == len(completion.token_ids)
    begin, worst = 0, 0.0
    for span in completion.policy_spans:
        expected = references[span.policy_version].logprobs(prompt, completion.token_ids, temperature, banned=banned)
        for index in range(begin, begin + span.num_tokens):
            worst = max(worst, abs(expected[index] - completion.logprobs[index]))
        begin += span.num_tokens
    return worst
