"""InferenceService over a fake engine: what is refused and why, back-pressure, cancelling."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from inference_svc.replica import Replica
from inference_svc.service import NAME
from inference_svc.settings import InferenceSettings
from surogate import errors
from surogate.rpc.health import is_serving
from surogate.rpc.server import RpcServer
from surogate.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.helpers.fake_engine import FakeEngine, fake_files
from tests.helpers.rpc import connected
from tests.helpers.waiting import until

SETTINGS = InferenceSettings(max_queue=4)


@asynccontextmanager
async def served(engine: FakeEngine | None, folder: Path) -> AsyncIterator[tuple[Any, Any]]:
    """(stub, channel) of a replica with `engine`; None is one whose model is still being loaded."""
    replicas = []

    def register(server: RpcServer) -> None:
        replicas.append(Replica(server, SETTINGS))
        if engine is not None:
            replicas[0].attach(engine, fake_files(folder))

    async with connected(register, SETTINGS) as channel:
        try:
            yield inference_pb2_grpc.InferenceServiceStub(channel), channel
        finally:
            replicas[0].staging.close()


def rollouts(n: int = 1, prompt: list[int] | None = None, **fields: Any) -> inference_pb2.GenerateRolloutsRequest:
    return inference_pb2.GenerateRolloutsRequest(
        prompt_token_ids=[1, 2, 3] if prompt is None else prompt, n=n, **fields
    )


async def test_a_group_comes_back_with_its_policy_version(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.policy_version = 5
    async with served(engine, tmp_path) as (stub, _):
        group = await stub.GenerateRollouts(rollouts(3, min_policy_version=5))
        model = await stub.GetServedModel(inference_pb2.GetServedModelRequest())

    assert len(group.completions) == 3
    assert group.cached_prompt_tokens == 3
    assert group.completions[0].policy_spans[0].policy_version == 5
    assert (model.policy_version, model.max_model_len, model.max_lora_rank) == (5, 64, 8)
    assert model.incarnation


async def test_nothing_is_served_while_the_model_loads(tmp_path: Path) -> None:
    async with served(None, tmp_path) as (stub, channel):
        with pytest.raises(errors.UnavailableError, match="being loaded"):
            await stub.GenerateRollouts(rollouts(), timeout=5)
        assert not await is_serving(channel, NAME)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (rollouts(0), "n: 0 completions"),
        (rollouts(1025), "n: 1025 completions"),
        (rollouts(prompt=[]), "at least 1"),
        (rollouts(prompt=[100]), "token id 100 is outside the vocabulary of 100"),
        (rollouts(prompt=[-1]), "token id -1 is outside"),
        (rollouts(prompt=[1] * 64), "prompt has 64 tokens; with max_model_len 64"),
        (rollouts(sampling=common_pb2.SamplingParams(temperature=-0.5)), "sampling.temperature"),
        (rollouts(sampling=common_pb2.SamplingParams(temperature=2.5)), "sampling.temperature: 2.5 must be 0, or 0.01"),
        (rollouts(sampling=common_pb2.SamplingParams(temperature=0.001)), "sampling.temperature"),
        (rollouts(sampling=common_pb2.SamplingParams(max_tokens=0)), "sampling.max_tokens"),
        (rollouts(sampling=common_pb2.SamplingParams(top_p=0)), "sampling.top_p"),
        (rollouts(sampling=common_pb2.SamplingParams(min_tokens=62)), "sampling.min_tokens"),
        (rollouts(sampling=common_pb2.SamplingParams(seed=-1)), "sampling.seed"),
        (rollouts(sampling=common_pb2.SamplingParams(stop=[""])), "sampling.stop"),
        (rollouts(sampling=common_pb2.SamplingParams(stop_token_ids=[100])), "sampling.stop_token_ids"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    request_: inference_pb2.GenerateRolloutsRequest, message: str, tmp_path: Path
) -> None:
    async with served(FakeEngine(), tmp_path) as (stub, _):
        with pytest.raises(errors.InvalidInputError, match=message):
            await stub.GenerateRollouts(request_)


async def test_a_stale_policy_is_refused_with_both_versions(tmp_path: Path) -> None:
    async with served(FakeEngine(), tmp_path) as (stub, _):
        with pytest.raises(errors.FailedPreconditionError) as caught:
            await stub.GenerateRollouts(rollouts(min_policy_version=2))
    assert caught.value.reason == "STALE_POLICY"
    assert caught.value.metadata == {"served": "0", "asked": "2"}


async def test_a_full_queue_asks_to_come_back(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with served(engine, tmp_path) as (stub, _):
        first = asyncio.ensure_future(stub.GenerateRollouts(rollouts(8)))
        await until(lambda: engine.running == 1)
        assert (await stub.GetServedModel(inference_pb2.GetServedModelRequest())).queue_length == 4

        with pytest.raises(errors.BusyError) as caught:
            await stub.GenerateRollouts(rollouts(1))
        assert caught.value.retry_after > 0

        engine.gate.set()
        await first
        await stub.GenerateRollouts(rollouts(8))


async def test_a_group_larger_than_the_queue_is_served_when_nothing_else_is(tmp_path: Path) -> None:
    async with served(FakeEngine(), tmp_path) as (stub, _):
        assert len((await stub.GenerateRollouts(rollouts(20))).completions) == 20


async def test_a_caller_who_leaves_frees_the_engine(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with served(engine, tmp_path) as (stub, _):
        group = stub.GenerateRollouts(rollouts(2))
        await until(lambda: engine.running == 1)
        group.cancel()
        await until(lambda: engine.aborted == 1)
        stream = stub.StreamGenerate(inference_pb2.StreamGenerateRequest(text="ab"))
        async for _piece in stream:
            break
        await until(lambda: engine.running == 1)
        stream.cancel()
        await until(lambda: engine.aborted == 2)
        assert (await stub.GetServedModel(inference_pb2.GetServedModelRequest())).queue_length == 0


async def test_text_and_conversations_stream(tmp_path: Path) -> None:
    message = common_pb2.ChatMessage(role="user", content="ab")
    async with served(FakeEngine(), tmp_path) as (stub, _):
        for request in (
            inference_pb2.StreamGenerateRequest(text="ab"),
            inference_pb2.StreamGenerateRequest(tokens=inference_pb2.StreamGenerateRequest.TokenIds(ids=[1])),
            inference_pb2.StreamGenerateRequest(
                conversation=inference_pb2.StreamGenerateRequest.Conversation(messages=[message])
            ),
        ):
            pieces = [piece async for piece in stub.StreamGenerate(request)]
            assert "".join(piece.text for piece in pieces) == "ab"
            assert pieces[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
            assert pieces[-1].prompt_tokens > 0 and not any(piece.prompt_tokens for piece in pieces[:-1])
        with pytest.raises(errors.InvalidInputError, match="one of conversation, text and tokens"):
            async for _ in stub.StreamGenerate(inference_pb2.StreamGenerateRequest()):
                pass


async def test_scores_are_of_every_token_but_the_first(tmp_path: Path) -> None:
    async with served(FakeEngine(), tmp_path) as (stub, _):
        request = inference_pb2.ScoreTokensRequest(
            sequences=[common_pb2.TokenSequence(ids=[1, 2, 3]), common_pb2.TokenSequence(ids=[4, 5])], temperature=0.5
        )
        response = await stub.ScoreTokens(request)
        assert [list(item.logprobs) for item in response.sequences] == [[-0.5, -0.5], [-0.5]]

        request.sequences[1].ids[:] = [4]
        with pytest.raises(errors.InvalidInputError, match=r"sequences\[1\].ids"):
            await stub.ScoreTokens(request)
        request.sequences[1].ids[:] = [4, 5]
        for temperature in (0, 0.001, 2.5):
            request.temperature = temperature
            with pytest.raises(errors.InvalidInputError, match=r"temperature: .* must be 0\.01 to 2"):
                await stub.ScoreTokens(request)
