"""What the servicers need of an engine; vLLM's is `vllm_backend.engine.VllmEngine`, tests have a fake."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from surogate.errors import UnavailableError
from surogate.v1 import common_pb2, inference_pb2


class EngineDiedError(UnavailableError):
    """The engine's process is gone. The service ends, to be started again."""

    reason = "ENGINE_DIED"


@dataclass(frozen=True)
class EngineFacts:
    """What was loaded and how."""

    model: str
    engine: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    lora_enabled: bool
    max_lora_rank: int


@dataclass(frozen=True)
class Group:
    """Completions of one prompt. `cached_prompt_tokens` is as told of the completion that ended last; seconds."""

    completions: Sequence[inference_pb2.Completion]
    cached_prompt_tokens: int
    queue_seconds: float
    generate_seconds: float


@dataclass(frozen=True)
class Piece:
    """A part of a streamed completion; `finish_reason` is UNSPECIFIED in all but the last."""

    text: str
    token_ids: Sequence[int]
    finish_reason: common_pb2.FinishReason.ValueType
    policy_version: int


@dataclass(frozen=True)
class Scores:
    """Natural-log probabilities of ids[1:], and the version of the weights that gave them."""

    logprobs: Sequence[float]
    policy_version: int


class Engine(Protocol):
    """Generates, scores, and takes new weights. Methods raise SurogateErrors; `EngineDiedError` once it is dead."""

    facts: EngineFacts
    policy_version: int
    """Version of the weights that serve; 0 is the model as loaded."""

    async def generate(self, prompt: Sequence[int], n: int, sampling: common_pb2.SamplingParams) -> Group:
        """n completions of one prompt. Cancelling aborts them."""
        ...

    def stream(self, prompt: Sequence[int], sampling: common_pb2.SamplingParams) -> AsyncIterator[Piece]:
        """One completion, piece by piece. Closing the iterator aborts it."""
        ...

    async def score(self, ids: Sequence[int], temperature: float) -> Scores:
        """Logprobs of each id after those before it; temperature > 0, two ids or more."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens that the tokenizer adds included."""
        ...

    def render(self, messages: Sequence[dict[str, object]]) -> list[int]:
        """Token ids of a conversation by the model's chat template, ready for the answer."""
        ...

    async def swap_adapter(self, directory: Path, version: int) -> float:
        """Pauses, loads the PEFT adapter in `directory`, resumes; returns the pause in seconds."""
        ...

    async def swap_weights(self, images: Sequence[Path], version: int) -> float:
        """Pauses, loads the model from safetensors files (of a tensor in several, the first counts), resumes."""
        ...

    async def died(self) -> str:
        """Returns, with the reason, when the engine is dead."""
        ...

    async def close(self) -> None:
        """Ends the engine's processes."""
        ...
