"""vLLM's AsyncLLM as the service's engine: generation, scoring, and swapping weights under requests in flight."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from inference_svc.engine_api import EngineDiedError, EngineFacts, Group, Piece, Scores
from inference_svc.vllm_backend import requests
from inference_svc.vllm_backend.fused_adapter import Parts, split_fused
from inference_svc.vllm_backend.zero_adapter import zero_adapter
from surogate.errors import InternalError, InvalidInputError, UnavailableError, UnimplementedError
from surogate.v1 import common_pb2

_ADAPTER_ID = 1
_SCORE_ATTEMPTS = 3
_DEATH_POLL_SECONDS = 0.25
_SHUTDOWN_SECONDS = 5.0


class VllmEngine:
    """An engine in a process of its own, made by `loading.load_engine`. `adapted` is a linear layer that an adapter may
    have (name, outputs, inputs), None without adapters. Its coroutines run on one event loop."""

    def __init__(self, llm: AsyncLLM, facts: EngineFacts, adapted: tuple[str, int, int] | None) -> None:
        self.facts = facts
        self.policy_version = 0
        self._llm = llm
        self._adapted = adapted
        # Every request carries the adapter, which adds nothing until the first push: so a request that began before
        # the push goes on with the pushed adapter, and is told apart by the versions that vLLM stamps on its tokens.
        self._adapter = LoRARequest("policy", _ADAPTER_ID, "policy") if adapted else None
        self._ids = itertools.count()
        self._fused: Parts = {}
        self._scores_at_temperature = False
        self._broken: str | None = None

    async def prepare(self) -> None:
        """What remains after the model is loaded: the version that it has, the adapter that adds nothing, scoring."""
        await self._llm.update_weight_version("0")
        await self._load_zero_adapter()
        self._fused = (await self._llm.collective_rpc("fused_layers"))[0]
        await self._llm.collective_rpc("install_generators")
        self._scores_at_temperature = all(await self._llm.collective_rpc("install_scoring"))

    async def generate(self, prompt: Sequence[int], n: int, sampling: common_pb2.SamplingParams) -> Group:
        """See `Engine.generate`."""
        start = time.perf_counter()
        params = requests.sampling_params(sampling, self.facts.max_model_len - len(prompt), n=n)
        output = await self._final(prompt, params)
        self._check()
        stats = output.metrics
        waited = stats.first_token_latency if stats else 0.0
        return Group(
            completions=[requests.completion(item) for item in output.outputs],
            cached_prompt_tokens=output.num_cached_tokens or 0,
            queue_seconds=waited,
            generate_seconds=max(time.perf_counter() - start - waited, 0.0),
        )

    async def stream(self, prompt: Sequence[int], sampling: common_pb2.SamplingParams) -> AsyncIterator[Piece]:
        """See `Engine.stream`."""
        params = requests.sampling_params(sampling, self.facts.max_model_len - len(prompt), stream=True)
        with self._translated():
            async with aclosing(self._request(prompt, params)) as outputs:
                async for output in outputs:
                    self._check()
                    yield self._piece(output.outputs[0])

    async def score(self, ids: Sequence[int], temperature: float) -> Scores:
        """See `Engine.score`."""
        if temperature != 1.0 and not self._scores_at_temperature:
            raise UnimplementedError("this model runner of vLLM scores at temperature 1 only")
        params = requests.scoring_params(ids[-1], temperature)
        for _ in range(_SCORE_ATTEMPTS):
            version = self.policy_version
            output = await self._final(ids[:-1], params)
            self._check()
            if output.outputs[0].finish_reason not in requests.FINISH:
                break
            if self.policy_version == version:
                return Scores(_scores(output, ids), version)
        raise UnavailableError("the weights changed while the tokens were scored; try again")

    def encode(self, text: str) -> list[int]:
        """See `Engine.encode`."""
        return list(self._llm.get_tokenizer().encode(text))

    def render(self, messages: Sequence[dict[str, object]]) -> list[int]:
        """See `Engine.render`. Raises InvalidInputError if the model has no template, or it refuses the messages."""
        tokenizer = self._llm.get_tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidInputError("the model's tokenizer has no chat template; send text or token ids")
        try:
            text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:
            raise InvalidInputError(f"the chat template refuses the conversation: {error}") from error
        return list(tokenizer.encode(text, add_special_tokens=False))

    async def swap_adapter(self, directory: Path, version: int) -> float:
        """See `Engine.swap_adapter`."""

        async def load() -> None:
            await self._llm.add_lora(LoRARequest("policy", _ADAPTER_ID, str(directory), load_inplace=True))

        await asyncio.to_thread(split_fused, directory, self._fused)
        return await self._swap(load, version)

    async def swap_weights(self, images: Sequence[Path], version: int) -> float:
        """See `Engine.swap_weights`. The adapter adds nothing afterwards: it belonged to the old weights."""

        async def load() -> None:
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest({"paths": [str(path) for path in images]}))
            await self._llm.finish_weight_update()
            await self._load_zero_adapter()

        return await self._swap(load, version)

    async def died(self) -> str:
        """See `Engine.died`."""
        while not self._llm.errored:  # noqa: ASYNC110 - vLLM has no event for it
            await asyncio.sleep(_DEATH_POLL_SECONDS)
        return "the engine's process ended unexpectedly; its last log lines say why"

    async def close(self) -> None:
        """See `Engine.close`. Nobody reads outputs any more: vLLM would log its end as a failure, with a traceback."""
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()
        await asyncio.to_thread(self._llm.shutdown, timeout=_SHUTDOWN_SECONDS)

    async def _swap(self, load: Callable[[], Awaitable[None]], version: int) -> float:
        """Pauses with requests kept, loads, resumes; returns seconds.

        The pause takes the keys and values away from the requests in flight and empties the prefix cache: requests go
        on by computing them anew under the new weights, so that each token's logprob is exactly its version's.
        """
        core = self._llm.engine_core
        start = time.perf_counter()
        with self._translated():
            await core.pause_scheduler_async("keep", True)
            try:
                await load()
                await self._llm.update_weight_version(str(version))
            except EngineDeadError:
                raise
            except Exception as error:
                await self._give_up(version)
                raise InternalError(f"version {version} could not be loaded: {error}", reason="SWAP_FAILED") from error
            self.policy_version = version
            self._broken = None
            await core.resume_scheduler_async()
        return time.perf_counter() - start

    async def _give_up(self, version: int) -> None:
        """After a failed swap: ends the requests in flight, so that none goes on with weights of no version."""
        self._broken = f"the weights of version {version} could not be loaded; push again"
        await self._llm.engine_core.pause_scheduler_async("abort", True)
        await self._llm.engine_core.resume_scheduler_async()

    async def _load_zero_adapter(self) -> None:
        if self._adapted is not None:
            with zero_adapter(*self._adapted) as directory:
                await self._llm.add_lora(LoRARequest("policy", _ADAPTER_ID, str(directory), load_inplace=True))

    async def _final(self, prompt: Sequence[int], params: SamplingParams) -> Any:
        """The only output of a request that reports when it is finished."""
        with self._translated():
            async with aclosing(self._request(prompt, params)) as outputs:
                async for output in outputs:
                    return output
        raise InternalError("vLLM ended a request without an output")

    def _request(self, prompt: Sequence[int], params: SamplingParams) -> Any:
        self._check()
        return self._llm.generate(tokens_input(list(prompt)), params, str(next(self._ids)), lora_request=self._adapter)

    def _check(self) -> None:
        if self._broken:
            raise UnavailableError(self._broken, reason="WEIGHTS_BROKEN")

    def _piece(self, output: Any) -> Piece:
        finish = output.finish_reason
        version = int(output.weight_versions[-1].version) if output.weight_versions else self.policy_version
        return Piece(
            text=output.text,
            token_ids=output.token_ids,
            finish_reason=requests.FINISH.get(finish, common_pb2.FINISH_REASON_ABORTED)
            if finish
            else common_pb2.FINISH_REASON_UNSPECIFIED,
            policy_version=version,
        )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """vLLM's exceptions as ours."""
        try:
            yield
        except EngineDeadError as error:
            raise EngineDiedError("the engine's process ended") from error
        except EngineGenerateError as error:
            raise InternalError(f"vLLM failed on a request: {error.__cause__ or error}") from error
        except ValueError as error:
            if isinstance(error, InvalidInputError):
                raise
            raise InvalidInputError(f"vLLM refuses the request: {error}") from error


def _scores(output: Any, ids: Sequence[int]) -> list[float]:
    """Logprobs of ids[1:]: those within the prompt, then that of the last id as the token after it."""
    within = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:-1], strict=True)]
    return [*within, output.outputs[0].logprobs[0][ids[-1]].logprob]
