"""A trainer, an inference replica and a reward service that answer at once: what is left is the orchestrator's time.

`python -m tests.bench.instant`; all three at one address. BENCH_TOKENS is the length of every completion.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any

from google.protobuf.empty_pb2 import Empty

from surogate import service
from surogate.config.service import ServiceSettings
from surogate.errors import NotFoundError
from surogate.rpc.server import RpcServer
from surogate.v1 import (
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
)

TOKENS = int(os.environ.get("BENCH_TOKENS", "16"))
NUM_PROMPTS = 1000
VOCABULARY = 260


def prompt_text(index: int) -> str:
    """What the user says in example `index`."""
    return f"prompt number {index}"


class InstantTrainer(trainer_pb2_grpc.TrainerServiceServicer):
    """One session; a step is done when its samples have arrived."""

    def __init__(self) -> None:
        self._session: trainer_pb2.Session | None = None

    async def CreateSession(self, request: trainer_pb2.CreateSessionRequest, _context: Any) -> trainer_pb2.Session:
        ready = trainer_pb2.Session.STATE_READY
        self._session = trainer_pb2.Session(session_id=request.session_id, state=ready)
        return self._session

    async def GetSession(self, request: trainer_pb2.GetSessionRequest, _context: Any) -> trainer_pb2.Session:
        if self._session is None or self._session.session_id != request.session_id:
            raise NotFoundError(f"no session {request.session_id}", reason="NO_SUCH_SESSION")
        return self._session

    async def WatchSession(
        self, request: trainer_pb2.WatchSessionRequest, context: Any
    ) -> AsyncIterator[trainer_pb2.SessionEvent]:
        yield trainer_pb2.SessionEvent(session=await self.GetSession(request, context))  # type: ignore[arg-type]

    async def TrainStep(
        self, request_iterator: AsyncIterator[trainer_pb2.TrainStepRequest], _context: Any
    ) -> trainer_pb2.TrainStepResponse:
        step = expected = received = 0
        async for request in request_iterator:
            step = request.header.step or step
            expected += request.header.num_samples
            received += len(request.samples.samples)
        assert self._session is not None and received == expected
        self._session.step = step
        return trainer_pb2.TrainStepResponse(step=step, metrics={"loss": 0.0})

    async def PushWeights(
        self, request: trainer_pb2.PushWeightsRequest, _context: Any
    ) -> trainer_pb2.PushWeightsResponse:
        replicas = [trainer_pb2.ReplicaPush(target=target) for target in request.targets]
        return trainer_pb2.PushWeightsResponse(version=request.version, seconds=1e-3, replicas=replicas)

    async def CreateCheckpoint(
        self, request: trainer_pb2.CreateCheckpointRequest, _context: Any
    ) -> trainer_pb2.TrainerCheckpoint:
        return trainer_pb2.TrainerCheckpoint(step=request.step, path="none", final=request.final)

    async def DeleteSession(self, request: trainer_pb2.DeleteSessionRequest, _context: Any) -> Empty:
        self._session = None
        return Empty()


class InstantInference(inference_pb2_grpc.InferenceServiceServicer):
    """Completions that are ready before they are asked for, by whatever policy version the request wants at least."""

    async def GetServedModel(
        self, _request: inference_pb2.GetServedModelRequest, _context: Any
    ) -> inference_pb2.ServedModel:
        return inference_pb2.ServedModel(
            max_model_len=4096, max_num_seqs=256, vocab_size=VOCABULARY, lora_enabled=True, max_lora_rank=64
        )

    async def GenerateRollouts(
        self, request: inference_pb2.GenerateRolloutsRequest, _context: Any
    ) -> inference_pb2.GenerateRolloutsResponse:
        return _completions(request.n, request.min_policy_version)


@lru_cache(maxsize=8)
def _completions(count: int, version: int) -> inference_pb2.GenerateRolloutsResponse:
    """`count` different completions of TOKENS printable characters."""
    response = inference_pb2.GenerateRolloutsResponse()
    for index in range(count):
        response.completions.add(
            token_ids=[40 + (7 * index + 3 * position) % 60 for position in range(TOKENS)],
            logprobs=[-0.01 * (position + 1) for position in range(TOKENS)],
            finish_reason=common_pb2.FINISH_REASON_STOP,
            policy_spans=[common_pb2.PolicySpan(policy_version=version, num_tokens=TOKENS)],
        )
    return response


class InstantReward(reward_pb2_grpc.RewardServiceServicer, reward_pb2_grpc.EnvironmentServiceServicer):
    """Rewards 0 and 1 by turns, so that every group has something to teach."""

    async def ListEnvironments(
        self, _request: reward_pb2.ListEnvironmentsRequest, _context: Any
    ) -> reward_pb2.ListEnvironmentsResponse:
        return reward_pb2.ListEnvironmentsResponse()

    async def ScoreRollouts(
        self, request: reward_pb2.ScoreRolloutsRequest, _context: Any
    ) -> reward_pb2.ScoreRolloutsResponse:
        response = reward_pb2.ScoreRolloutsResponse()
        for index, rollout in enumerate(request.rollouts):
            response.results.add(rollout_id=rollout.rollout_id, score=reward_pb2.Score(reward=index % 2))
        return response

    async def ListExamples(
        self, _request: reward_pb2.ListExamplesRequest, _context: Any
    ) -> AsyncIterator[reward_pb2.Example]:
        for index in range(NUM_PROMPTS):
            prompt = [common_pb2.ChatMessage(role="user", content=prompt_text(index))]
            yield reward_pb2.Example(id=str(index), prompt=prompt)


def register(server: RpcServer, trainer: InstantTrainer, inference: InstantInference, reward: InstantReward) -> None:
    """Has a server answer as all of them."""
    for add, servicer, name in (
        (trainer_pb2_grpc.add_TrainerServiceServicer_to_server, trainer, "TrainerService"),
        (inference_pb2_grpc.add_InferenceServiceServicer_to_server, inference, "InferenceService"),
        (reward_pb2_grpc.add_RewardServiceServicer_to_server, reward, "RewardService"),
        (reward_pb2_grpc.add_EnvironmentServiceServicer_to_server, reward, "EnvironmentService"),
    ):
        server.add(add, servicer, f"surogate.v1.{name}")
    server.set_serving("surogate.v1.WeightUpdateService", True)  # what an orchestrator waits for


@asynccontextmanager
async def lifespan(server: RpcServer, _settings: ServiceSettings) -> AsyncIterator[None]:
    register(server, InstantTrainer(), InstantInference(), InstantReward())
    yield


if __name__ == "__main__":
    sys.exit(service.main(ServiceSettings, lifespan))
