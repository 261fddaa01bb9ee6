"""An engine without vLLM, for tests of the service around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from inference_svc.engine_api import EngineFacts, Group, Piece, Scores
from inference_svc.model_files import ModelFiles, TensorInfo
from surogate.errors import InternalError
from surogate.v1 import common_pb2, inference_pb2

FACTS = EngineFacts(
    model="fake",
    engine="fake 1",
    dtype="float32",
    max_model_len=64,
    max_num_seqs=4,
    vocab_size=100,
    lora_enabled=True,
    max_lora_rank=8,
)
LAYER = "model.layers.0.self_attn.o_proj"
EMBEDDING = "model.embed_tokens.weight"


def fake_files(directory: Path) -> ModelFiles:
    """A checkpoint of an embedding of 100 x 16, which is tied to the output head, and a linear layer of 16 x 16."""
    file = directory / "model.safetensors"
    tensors = {
        EMBEDDING: TensorInfo("F32", (100, 16), file),
        f"{LAYER}.weight": TensorInfo("F32", (16, 16), file),
    }
    return ModelFiles(directory, {"tie_word_embeddings": True}, tensors)


class FakeEngine:
    """Answers at once, or when `gate` is set after `gate.clear()`; `fail_swap` makes the next swap fail."""

    def __init__(self, facts: EngineFacts = FACTS) -> None:
        self.facts = facts
        self.policy_version = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail_swap = False
        self.running = 0
        self.aborted = 0
        self.adapters: list[set[str]] = []
        self.images: list[list[Path]] = []

    async def generate(self, prompt: Sequence[int], n: int, sampling: common_pb2.SamplingParams) -> Group:
        await self._turn()
        completion = inference_pb2.Completion(
            token_ids=[7, 8],
            logprobs=[-1.0, -2.0],
            finish_reason=common_pb2.FINISH_REASON_STOP,
            policy_spans=[common_pb2.PolicySpan(policy_version=self.policy_version, num_tokens=2)],
        )
        return Group([completion] * n, 3, 0.25, 0.5)

    async def stream(self, prompt: Sequence[int], sampling: common_pb2.SamplingParams) -> AsyncIterator[Piece]:
        yield Piece("a", [7], common_pb2.FINISH_REASON_UNSPECIFIED, self.policy_version)
        await self._turn()
        yield Piece("b", [8], common_pb2.FINISH_REASON_LENGTH, self.policy_version)

    async def score(self, ids: Sequence[int], temperature: float) -> Scores:
        await self._turn()
        return Scores([-temperature] * (len(ids) - 1), self.policy_version)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % self.facts.vocab_size for letter in text]

    def render(self, messages: Sequence[dict[str, object]]) -> list[int]:
        return self.encode("".join(str(message["content"]) for message in messages))

    async def swap_adapter(self, directory: Path, version: int) -> float:
        self.adapters.append({file.name for file in directory.iterdir()})  # noqa: ASYNC240
        return self._swapped(version)

    async def swap_weights(self, images: Sequence[Path], version: int) -> float:
        self.images.append(list(images))
        return self._swapped(version)

    async def died(self) -> str:
        await asyncio.Event().wait()
        return ""

    async def close(self) -> None:
        return None

    def _swapped(self, version: int) -> float:
        if self.fail_swap:
            self.fail_swap = False
            raise InternalError("the fake was told to fail")
        self.policy_version = version
        return 0.01

    async def _turn(self) -> None:
        self.running += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.running -= 1
