"""The other three services of a GRPO job, hand-written and deterministic, on real gRPC servers.

"Weights" are a number: a digest of all the samples trained on so far, in order. Two trainers that were given the same
steps have the same weights. Tokens are a function of the request's seed; whatever a test needs to go wrong is a hook.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from google.protobuf.empty_pb2 import Empty

from surogate.errors import FailedPreconditionError, NotFoundError, OutOfRangeError
from surogate.rpc.status import to_status
from surogate.structs import from_struct, to_struct
from surogate.v1 import (
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
)
from tests.helpers.rpc import serving

Session = trainer_pb2.Session
VOCABULARY = 260


class Hooks:
    """What a test does when a method is called: `hooks.on["TrainStep"] = …`; every call is counted."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.total = 0
        self.on: dict[str, Callable[[Any], Awaitable[Any]]] = {}
        self.each: Callable[[str], Awaitable[None]] | None = None

    async def reach(self, method: str, request: Any = None) -> Any:
        """Counts a call and lets the test have its say; what the hook returns replaces the answer."""
        self.calls[method] += 1
        self.total += 1
        if self.each is not None:
            await self.each(method)
        hook = self.on.get(method)
        return None if hook is None else await hook(request)


@dataclass
class Disk:
    """What survives the trainer: checkpoints, weights by step."""

    checkpoints: dict[str, tuple[int, int]] = field(default_factory=dict)

    def newest(self) -> str:
        return max(self.checkpoints, key=lambda path: self.checkpoints[path][0], default="")


class FakeTrainer(trainer_pb2_grpc.TrainerServiceServicer):
    """GRPO sessions over a number. `restart()` loses all but the disk."""

    def __init__(self, hooks: Hooks, replicas: dict[str, FakeInference]) -> None:
        self.hooks = hooks
        self.replicas = replicas
        self.disk = Disk()
        self.history: list[tuple[int, int]] = []
        """(step, weights after it) in the order of training, replays included."""
        self.samples: list[trainer_pb2.TrainingSample] = []
        """All that it was given, in the order in which it came."""
        self.restart()

    def restart(self) -> None:
        self.session: Session | None = None
        self.weights = 0
        self.stored: dict[int, dict[str, float]] = {}

    async def CreateSession(self, request: trainer_pb2.CreateSessionRequest, context: Any) -> Session:
        await self.hooks.reach("CreateSession", request)
        if self.session is None:
            path = request.resume_from or ("" if request.fresh else self.disk.newest())
            step, self.weights = self.disk.checkpoints[path] if path else (0, 0)
            self.session = Session(session_id=request.session_id, state=Session.STATE_READY, step=step, checkpoint=path)
        return self.session

    async def GetSession(self, request: trainer_pb2.GetSessionRequest, context: Any) -> Session:
        await self.hooks.reach("GetSession", request)
        return self._find(request.session_id)

    async def WatchSession(
        self, request: trainer_pb2.WatchSessionRequest, context: Any
    ) -> AsyncIterator[trainer_pb2.SessionEvent]:
        yield trainer_pb2.SessionEvent(warning="lora_dropout is 0 in GRPO")
        yield trainer_pb2.SessionEvent(session=self._find(request.session_id))

    async def TrainStep(
        self, request_iterator: AsyncIterator[trainer_pb2.TrainStepRequest], context: Any
    ) -> trainer_pb2.TrainStepResponse:
        requests = [request async for request in request_iterator]
        header = requests[0].header
        samples = [sample for request in requests[1:] for sample in request.samples.samples]
        assert header.num_samples == len(samples)
        await self.hooks.reach("TrainStep", header)
        session = self._find(header.session_id)
        if header.step == session.step and header.step in self.stored:
            return trainer_pb2.TrainStepResponse(step=header.step, metrics=self.stored[header.step], repeated_call=True)
        if header.step != session.step + 1:
            raise OutOfRangeError(f"step {header.step} after {session.step}", reason="STEP_OUT_OF_ORDER")
        self._optimise(header.step, samples)
        await self.hooks.reach("TrainStep done", header)
        return trainer_pb2.TrainStepResponse(step=header.step, metrics=self.stored[header.step])

    def _optimise(self, step: int, samples: list[trainer_pb2.TrainingSample]) -> None:
        assert self.session is not None
        self.samples += samples
        digest = xxhash.xxh3_64(self.weights.to_bytes(8, "big"))
        for sample in sorted(samples, key=lambda sample: sample.sample_id):
            digest.update(sample.SerializeToString(deterministic=True))
        self.weights = digest.intdigest()
        self.session.step = step
        self.stored = {step: {"loss": self.weights % 1000 / 1000, "grad_norm": 1.0}}
        self.history.append((step, self.weights))

    async def PushWeights(
        self, request: trainer_pb2.PushWeightsRequest, context: Any
    ) -> trainer_pb2.PushWeightsResponse:
        answer = await self.hooks.reach("PushWeights", request)
        assert request.version == self._find(request.session_id).step
        response = trainer_pb2.PushWeightsResponse(version=request.version, num_bytes=100, seconds=0.01)
        for target in request.targets:
            replica = self.replicas[target]
            outcome = response.replicas.add(target=target)
            if answer is not None and target in answer:
                outcome.error.CopyFrom(to_status(answer[target]))
            elif replica.version >= request.version:
                outcome.error.CopyFrom(to_status(FailedPreconditionError("the version is not greater")))
            else:
                replica.version, replica.weights = request.version, self.weights
        await self.hooks.reach("PushWeights done", request)
        return response

    async def CreateCheckpoint(
        self, request: trainer_pb2.CreateCheckpointRequest, context: Any
    ) -> trainer_pb2.TrainerCheckpoint:
        await self.hooks.reach("CreateCheckpoint", request)
        assert request.step == self._find(request.session_id).step
        path = f"checkpoint-{request.step}"
        self.disk.checkpoints[path] = (request.step, self.weights)
        await self.hooks.reach("CreateCheckpoint done", request)
        return trainer_pb2.TrainerCheckpoint(step=request.step, path=path, final=request.final)

    async def ComputeLogprobs(
        self, request: trainer_pb2.ComputeLogprobsRequest, context: Any
    ) -> trainer_pb2.ComputeLogprobsResponse:
        await self.hooks.reach("ComputeLogprobs", request)
        return trainer_pb2.ComputeLogprobsResponse(
            sequences=[_scores(item, self.weights) for item in request.sequences]
        )

    async def DeleteSession(self, request: trainer_pb2.DeleteSessionRequest, context: Any) -> Empty:
        self._find(request.session_id)
        self.restart()
        return Empty()

    def _find(self, session_id: str) -> Session:
        if self.session is None or self.session.session_id != session_id:
            raise NotFoundError(f"no session {session_id}", reason="NO_SUCH_SESSION")
        return self.session


class FakeInference(inference_pb2_grpc.InferenceServiceServicer):
    """Completions of 3 to 6 tokens that depend on the seed alone. `restart()` serves version 0."""

    def __init__(self, hooks: Hooks, seconds: float = 0.0) -> None:
        self.hooks = hooks
        self.seconds = seconds
        self.served: list[str] = []
        self.restart()

    def restart(self) -> None:
        self.version = 0
        self.weights = 0
        self.base_id = ""

    async def GetServedModel(
        self, request: inference_pb2.GetServedModelRequest, context: Any
    ) -> inference_pb2.ServedModel:
        return inference_pb2.ServedModel(
            policy_version=self.version,
            max_model_len=256,
            max_num_seqs=64,
            vocab_size=VOCABULARY,
            lora_enabled=True,
            max_lora_rank=16,
            base_id=self.base_id,
        )

    async def GenerateRollouts(
        self, request: inference_pb2.GenerateRolloutsRequest, context: Any
    ) -> inference_pb2.GenerateRolloutsResponse:
        answer = await self.hooks.reach("GenerateRollouts", request)
        if answer is not None:
            return answer
        if self.version < request.min_policy_version:
            raise FailedPreconditionError(f"version {self.version} serves", reason="STALE_POLICY")
        self.served.append(request.request_id)
        version = self.version
        if self.seconds:
            await asyncio.sleep(self.seconds)
        return completions(request, version)

    async def ScoreTokens(
        self, request: inference_pb2.ScoreTokensRequest, context: Any
    ) -> inference_pb2.ScoreTokensResponse:
        await self.hooks.reach("ScoreTokens", request)
        return inference_pb2.ScoreTokensResponse(
            sequences=[_scores(item, self.weights) for item in request.sequences], policy_version=self.version
        )


class FakeReward(reward_pb2_grpc.RewardServiceServicer, reward_pb2_grpc.EnvironmentServiceServicer):
    """20 prompts to train on, 4 held out; the reward is a hash of the completion, between 0 and 1.

    With `multi_turn` it answers the model's turns, and remembers what it was told in `state["heard"]`. Every third
    completion ends the episode.
    """

    def __init__(self, hooks: Hooks, *, num_train: int = 20, multi_turn: bool = False) -> None:
        self.hooks = hooks
        self.num_train = num_train
        self.multi_turn = multi_turn
        self.scored: list[reward_pb2.Rollout] = []

    async def ListEnvironments(
        self, request: reward_pb2.ListEnvironmentsRequest, context: Any
    ) -> reward_pb2.ListEnvironmentsResponse:
        environment = reward_pb2.Environment(id="fake", has_examples=True, multi_turn=self.multi_turn)
        return reward_pb2.ListEnvironmentsResponse(environments=[environment])

    async def TakeTurn(self, request: reward_pb2.TakeTurnRequest, context: Any) -> reward_pb2.TakeTurnResponse:
        answer = await self.hooks.reach("TakeTurn", request)
        if answer is not None:
            return answer
        said = request.messages[-1].content
        response = reward_pb2.TakeTurnResponse()
        heard = from_struct(request.state).get("heard", [])
        assert len(heard) == request.turn - 1
        response.state.CopyFrom(to_struct({"heard": [*heard, said]}))
        if xxhash.xxh3_64_intdigest(said.encode()) % 3:
            response.messages.add(role="user", content=f"You said {said!r}. Again.")
        return response

    async def ScoreRollouts(
        self, request: reward_pb2.ScoreRolloutsRequest, context: Any
    ) -> reward_pb2.ScoreRolloutsResponse:
        answer = await self.hooks.reach("ScoreRollouts", request)
        self.scored += request.rollouts
        return scores(request) if answer is None else answer

    async def ListExamples(
        self, request: reward_pb2.ListExamplesRequest, context: Any
    ) -> AsyncIterator[reward_pb2.Example]:
        others = await self.hooks.reach("ListExamples", request)
        for example in others or ():
            yield example
        if others is not None:
            return
        held_out = request.split == reward_pb2.ListExamplesRequest.SPLIT_EVAL
        for index in range(4 if held_out else self.num_train):
            text = f"{'held out' if held_out else 'train'} {index}"
            prompt = [common_pb2.ChatMessage(role="user", content=text)]
            yield reward_pb2.Example(id=str(index), prompt=prompt, answer=text[::-1])


def completions(request: inference_pb2.GenerateRolloutsRequest, version: int) -> inference_pb2.GenerateRolloutsResponse:
    """What a policy of that version generates."""
    response = inference_pb2.GenerateRolloutsResponse()
    for index in range(request.n):
        random = np.random.default_rng(request.sampling.seed + index)
        length = int(random.integers(3, 7))
        response.completions.add(
            token_ids=random.integers(4, VOCABULARY, length).tolist(),
            logprobs=(-random.random(length)).tolist(),
            finish_reason=common_pb2.FINISH_REASON_STOP,
            policy_spans=[common_pb2.PolicySpan(policy_version=version, num_tokens=length)],
        )
    return response


def scores(request: reward_pb2.ScoreRolloutsRequest) -> reward_pb2.ScoreRolloutsResponse:
    """The rewards of a group."""
    response = reward_pb2.ScoreRolloutsResponse()
    for rollout in request.rollouts:
        reward = xxhash.xxh3_64_intdigest(rollout.completion.encode()) % 1000 / 1000
        response.results.add(
            rollout_id=rollout.rollout_id, score=reward_pb2.Score(reward=reward, components={"exact": 0.0})
        )
    return response


def _scores(sequence: common_pb2.TokenSequence, weights: int) -> common_pb2.TokenLogprobs:
    return common_pb2.TokenLogprobs(logprobs=[-(weights % 97) / 97] * (len(sequence.ids) - 1))


@dataclass
class Fakes:
    """All of them, and where they listen."""

    hooks: Hooks
    trainer: FakeTrainer
    inference: list[FakeInference]
    reward: FakeReward
    addresses: dict[str, list[str]]


@asynccontextmanager
async def serving_fakes(replicas: int = 1, **reward: Any) -> AsyncIterator[Fakes]:
    """Serves a fake trainer, replicas and a reward service, each on a port of its own."""
    hooks = Hooks()
    by_address: dict[str, FakeInference] = {}
    fakes = Fakes(
        hooks,
        FakeTrainer(hooks, by_address),
        [FakeInference(hooks) for _ in range(replicas)],
        FakeReward(hooks, **reward),
        {"trainer": [], "inference": [], "reward": []},
    )
    async with _serve(trainer_pb2_grpc.add_TrainerServiceServicer_to_server, fakes.trainer, "TrainerService") as at:
        fakes.addresses["trainer"] = [at]
        async with _serve_reward(fakes.reward) as at_reward:
            fakes.addresses["reward"] = [at_reward]
            async with _serve_all(fakes.inference) as at_inference:
                fakes.addresses["inference"] = at_inference
                by_address.update(zip(at_inference, fakes.inference, strict=True))
                yield fakes


@asynccontextmanager
async def _serve(add: Any, servicer: Any, name: str) -> AsyncIterator[str]:
    async with serving(lambda server: server.add(add, servicer, f"surogate.v1.{name}")) as server:
        yield server.address


@asynccontextmanager
async def _serve_reward(servicer: FakeReward) -> AsyncIterator[str]:
    def register(server: Any) -> None:
        add = reward_pb2_grpc.add_EnvironmentServiceServicer_to_server
        server.add(reward_pb2_grpc.add_RewardServiceServicer_to_server, servicer, "surogate.v1.RewardService")
        server.add(add, servicer, "surogate.v1.EnvironmentService")

    async with serving(register) as server:
        yield server.address


@asynccontextmanager
async def _serve_all(replicas: list[FakeInference]) -> AsyncIterator[list[str]]:
    if not replicas:
        yield []
        return
    add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    async with _serve(add, replicas[0], "InferenceService") as first, _serve_all(replicas[1:]) as rest:
        yield [first, *rest]
