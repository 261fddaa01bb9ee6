"""InferenceService: checks, admission, and the engine behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any
from uuid import uuid4

from inference_svc import metrics, sampling
from inference_svc.admission import Admission
from inference_svc.engine_api import Engine, Scores
from inference_svc.updates import Updates
from surogate.errors import FailedPreconditionError, InvalidInputError, SurogateError, UnavailableError
from surogate.structs import from_struct
from surogate.v1 import common_pb2, inference_pb2, inference_pb2_grpc

NAME = "surogate.v1.InferenceService"
_MAX_ID_LENGTH = 256


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serves once `attach` gave it an engine; until then every call is UNAVAILABLE."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._admission = Admission(1, 0)
        self._incarnation = uuid4().hex
        self._updates: Updates | None = None

    def attach(self, engine: Engine, max_queue: int | None, updates: Updates) -> None:
        """Starts serving by `engine`; `max_queue` sequences may wait, by default four times those generated at once.

        `updates` knows what was pushed.
        """
        running = engine.facts.max_num_seqs
        self._admission = Admission(running, max_queue or 4 * running)
        self._engine = engine
        self._updates = updates
        metrics.IN_FLIGHT.set_function(lambda: self._admission.in_flight)
        metrics.QUEUE_LENGTH.set_function(lambda: self._admission.queue_length)
        metrics.POLICY_VERSION.set_function(lambda: engine.policy_version)

    async def GetServedModel(  # noqa: N802
        self, _request: inference_pb2.GetServedModelRequest, _context: Any
    ) -> inference_pb2.ServedModel:
        """What is served now."""
        engine = self._ready()
        facts = engine.facts
        return inference_pb2.ServedModel(
            model=facts.model,
            policy_version=engine.policy_version,
            max_model_len=facts.max_model_len,
            max_num_seqs=facts.max_num_seqs,
            vocab_size=facts.vocab_size,
            dtype=facts.dtype,
            lora_enabled=facts.lora_enabled,
            max_lora_rank=facts.max_lora_rank,
            engine=facts.engine,
            queue_length=self._admission.queue_length,
            incarnation=self._incarnation,
            adapter=self._updates.adapter if self._updates else "",
            base_id=self._updates.base_id if self._updates else "",
        )

    async def GenerateRollouts(  # noqa: N802
        self, request: inference_pb2.GenerateRolloutsRequest, _context: Any
    ) -> inference_pb2.GenerateRolloutsResponse:
        """A group of completions of one prompt."""
        with self._counted("rollouts"):
            engine = self._ready(request.min_policy_version)
            sampling.check_count(request.n)
            prompt = list(request.prompt_token_ids)
            self._check(engine, prompt, request.sampling, field="prompt_token_ids", request_id=request.request_id)
            with self._admission.admit(request.n):
                group = await engine.generate(prompt, request.n, request.sampling)
        metrics.PROMPT_TOKENS.inc(len(prompt))
        metrics.CACHED_TOKENS.inc(group.cached_prompt_tokens)
        metrics.GENERATED_TOKENS.inc(sum(len(completion.token_ids) for completion in group.completions))
        return inference_pb2.GenerateRolloutsResponse(
            completions=group.completions,
            cached_prompt_tokens=group.cached_prompt_tokens,
            queue_seconds=group.queue_seconds,
            generate_seconds=group.generate_seconds,
        )

    async def StreamGenerate(  # noqa: N802
        self, request: inference_pb2.StreamGenerateRequest, _context: Any
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        """One completion as text."""
        with self._counted("stream"):
            engine = self._ready(request.min_policy_version)
            prompt = _prompt(engine, request)
            self._check(engine, prompt, request.sampling, field="prompt", request_id=request.request_id)
            with self._admission.admit(1):
                async with aclosing(engine.stream(prompt, request.sampling)) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        metrics.GENERATED_TOKENS.inc(len(piece.token_ids))
                        yield inference_pb2.StreamGenerateResponse(
                            text=piece.text,
                            token_ids=piece.token_ids,
                            finish_reason=piece.finish_reason,
                            policy_version=piece.policy_version,
                            prompt_tokens=len(prompt) if piece.finish_reason else 0,
                        )
        metrics.PROMPT_TOKENS.inc(len(prompt))

    async def ScoreTokens(  # noqa: N802
        self, request: inference_pb2.ScoreTokensRequest, _context: Any
    ) -> inference_pb2.ScoreTokensResponse:
        """Logprobs of given tokens, all by one version."""
        with self._counted("score"):
            engine = self._ready(request.min_policy_version)
            temperature = request.temperature if request.HasField("temperature") else 1.0
            if not 1 <= len(request.sequences) <= sampling.MAX_SEQUENCES:
                raise InvalidInputError(
                    f"sequences: {len(request.sequences)} are given; 1 to {sampling.MAX_SEQUENCES} can be"
                )
            sequences = [list(sequence.ids) for sequence in request.sequences]
            for index, ids in enumerate(sequences):
                sampling.check_scoring(ids, temperature, engine.facts, field=f"sequences[{index}].ids")
            with self._admission.admit(len(sequences)):
                return await _score(engine, sequences, temperature)

    def _ready(self, min_policy_version: int = 0) -> Engine:
        """The engine. Raises UnavailableError while there is none, FailedPreconditionError if its weights are stale."""
        if self._engine is None:
            raise UnavailableError("the model is being loaded", reason="LOADING")
        served = self._engine.policy_version
        if served < min_policy_version:
            raise FailedPreconditionError(
                f"policy version {served} is served; at least {min_policy_version} is asked for",
                reason="STALE_POLICY",
                metadata={"served": str(served), "asked": str(min_policy_version)},
            )
        return self._engine

    def _check(
        self,
        engine: Engine,
        prompt: Sequence[int],
        wanted: common_pb2.SamplingParams,
        *,
        field: str,
        request_id: str,
    ) -> None:
        if len(request_id) > _MAX_ID_LENGTH:
            raise InvalidInputError(f"request_id: takes {_MAX_ID_LENGTH} characters at most")
        sampling.check_ids(prompt, engine.facts, field=field)
        sampling.check_prompt_length(len(prompt), engine.facts, field=field)
        sampling.check_sampling(wanted, engine.facts, engine.facts.max_model_len - len(prompt))

    @contextmanager
    def _counted(self, kind: str) -> Iterator[None]:
        result = "ok"
        try:
            yield
        except SurogateError as error:
            result = error.reason.lower()
            raise
        except (asyncio.CancelledError, GeneratorExit):
            result = "cancelled"
            raise
        finally:
            metrics.REQUESTS.labels(kind, result).inc()


def _prompt(engine: Engine, request: inference_pb2.StreamGenerateRequest) -> list[int]:
    match request.WhichOneof("prompt"):
        case "conversation":
            if not request.conversation.messages:
                raise InvalidInputError("conversation.messages: there must be at least one message")
            return engine.render([_message(message) for message in request.conversation.messages])
        case "text":
            return engine.encode(request.text)
        case "tokens":
            return list(request.tokens.ids)
        case _:
            raise InvalidInputError("prompt: give one of conversation, text and tokens")


def _message(message: common_pb2.ChatMessage) -> dict[str, object]:
    return {**from_struct(message.extra), "role": message.role, "content": message.content}


async def _score(
    engine: Engine, sequences: Sequence[Sequence[int]], temperature: float
) -> inference_pb2.ScoreTokensResponse:
    """Scores all sequences, again if the weights changed between two of them."""
    while True:
        scores = await _all(engine.score(ids, temperature) for ids in sequences)
        versions = {score.policy_version for score in scores}
        if len(versions) == 1:
            return inference_pb2.ScoreTokensResponse(
                sequences=[common_pb2.TokenLogprobs(logprobs=score.logprobs) for score in scores],
                policy_version=versions.pop(),
            )


async def _all(scores: Iterable[Coroutine[Any, Any, Scores]]) -> list[Scores]:
    """Runs them at once; the first failure, or being cancelled, cancels the others."""
    tasks = [asyncio.create_task(score) for score in scores]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
