"""`surogate env eval`: what a served model earns in an environment, before any training."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.duration_pb2 import Duration

from surogate.cli.console import all_shown
from surogate.cli.exits import FAILED, OK, reaching, usage
from surogate.cli.generate import START_INFERENCE
from surogate.cli.rewards import env_report
from surogate.cli.rewards.env_report import Group
from surogate.cli.rewards.reward_service import START_REWARD, reward_channel
from surogate.client.aio import AsyncClient
from surogate.errors import DataLossError, DeadlineError, NotFoundError, SurogateError, UnimplementedError
from surogate.reward.dataset import read_rows
from surogate.reward.prompts import DatasetArgs, to_example
from surogate.rpc.status import from_status
from surogate.structs import to_struct
from surogate.v1 import common_pb2, reward_pb2, reward_pb2_grpc

_CONCURRENT = 64
_GRACE = 5.0
_RUN = "evaluation"
_SPLITS = {
    "train": reward_pb2.ListExamplesRequest.SPLIT_TRAIN,
    "eval": reward_pb2.ListExamplesRequest.SPLIT_EVAL,
}


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate, and how."""

    environment: str
    args: Mapping[str, Any]
    inference: str
    """HOST:PORT of the served model."""
    address: str | None
    """HOST:PORT of the reward service; None is the built-in one, started for this."""
    split: str
    examples: int
    rollouts: int
    """Completions of each prompt."""
    seed: int
    temperature: float
    max_tokens: int | None
    max_turns: int
    """Most turns of the model, where the environment answers them."""
    item_timeout: float
    """Seconds that one rollout may take to score."""


def evaluate(wanted: Evaluation, *, samples: int, as_json: bool) -> int:
    """Prints reward statistics and samples; returns FAILED if nothing could be scored."""
    groups = asyncio.run(_evaluate(wanted))
    found = env_report.summary(groups, samples)
    if as_json:
        sys.stdout.write(f"{json.dumps({'environment': wanted.environment, **found}, ensure_ascii=False)}\n")
    else:
        title = f"{wanted.environment}, {found['examples']} prompts of {wanted.split}"
        env_report.show(title, found)
    return OK if found["scored"] else FAILED


async def _evaluate(wanted: Evaluation) -> list[Group]:
    with reaching("reward service", wanted.address or "this machine", START_REWARD):
        async with reward_channel(wanted.address) as channel, AsyncClient(wanted.inference) as client:
            evaluator = _Evaluator(wanted, client, channel, await _environment(channel, wanted))
            examples = await evaluator.examples()
            with reaching("inference service", wanted.inference, START_INFERENCE):
                await client.served_model()
            groups = [Group(str(number), example) for number, example in enumerate(examples)]
            await all_shown("evaluating", (evaluator.fill(group) for group in groups))
            return groups


async def _environment(channel: Any, wanted: Evaluation) -> reward_pb2.Environment:
    """Raises NotFoundError for an environment that the service does not list."""
    stub: Any = reward_pb2_grpc.RewardServiceStub(channel)
    listed = (await stub.ListEnvironments(reward_pb2.ListEnvironmentsRequest())).environments
    for environment in listed:
        if environment.id == wanted.environment:
            return environment  # type: ignore[no-any-return]  # grpc's stubs for asyncio are untyped
    names = ", ".join(environment.id for environment in listed)
    raise NotFoundError(f"no environment {wanted.environment!r}; the reward service has {names}")


class _Evaluator:
    """Generates and scores groups, a bounded number of calls at once."""

    def __init__(
        self, wanted: Evaluation, client: AsyncClient, channel: Any, environment: reward_pb2.Environment
    ) -> None:
        self._wanted = wanted
        self._client = client
        self._rewards: Any = reward_pb2_grpc.RewardServiceStub(channel)
        self._environments: Any = reward_pb2_grpc.EnvironmentServiceStub(channel)
        self._max_turns = wanted.max_turns if environment.multi_turn else 1
        self._multi_turn = environment.multi_turn
        self._args = to_struct(wanted.args)
        self._room = asyncio.Semaphore(_CONCURRENT)

    async def examples(self) -> list[reward_pb2.Example]:
        """The prompts: the environment's own, else those of `args.dataset`, a file on this machine."""
        wanted = self._wanted
        asked = reward_pb2.ListExamplesRequest(
            environment=wanted.environment,
            args=self._args,
            split=_SPLITS[wanted.split],
            seed=wanted.seed,
            max_examples=wanted.examples,
        )
        try:
            found = [example async for example in self._environments.ListExamples(asked)]
        except UnimplementedError as error:
            found = _from_dataset(wanted, error)
        if not found:
            raise usage("--split", f"environment {wanted.environment} has no prompts in {wanted.split}")
        return found

    async def fill(self, group: Group) -> None:
        """Gives a group its rollouts and their scores."""
        rollouts = (self._rollout(group, index) for index in range(self._wanted.rollouts))
        group.rollouts = list(await asyncio.gather(*rollouts))
        async with self._room:
            await self._score(group)

    async def _rollout(self, group: Group, index: int) -> reward_pb2.Rollout:
        rollout = reward_pb2.Rollout(rollout_id=f"{group.number}-{index}")
        seed = (self._wanted.seed + int(group.number) * self._wanted.rollouts + index) % 2**31
        async with self._room:
            for turn in range(1, self._max_turns + 1):
                await self._generate(group.example, rollout, seed)
                if self._multi_turn and not await self._answered(group, rollout, turn):
                    break
        return rollout

    async def _generate(self, example: reward_pb2.Example, rollout: reward_pb2.Rollout, seed: int) -> None:
        """The model's next turn, put into the rollout."""
        sampling = common_pb2.SamplingParams(
            temperature=self._wanted.temperature, max_tokens=self._wanted.max_tokens, seed=seed
        )
        said = [{"role": item.role, "content": item.content} for item in (*example.prompt, *rollout.messages)]
        rollout.completion = ""
        async for piece in self._client.stream(said, sampling):
            rollout.completion += piece.text
            rollout.num_tokens += len(piece.token_ids)
            rollout.finish_reason = piece.finish_reason

    async def _answered(self, group: Group, rollout: reward_pb2.Rollout, turn: int) -> bool:
        """Has the environment answer the model's turn; returns whether the episode goes on."""
        rollout.messages.add(role="assistant", content=rollout.completion)
        asked = reward_pb2.TakeTurnRequest(
            run=_RUN,
            group_id=group.number,
            rollout_id=rollout.rollout_id,
            environment=self._wanted.environment,
            args=self._args,
            example=group.example,
            turn=turn,
            messages=rollout.messages,
            state=rollout.state,
            timeout=_duration(self._wanted.item_timeout),
        )
        answer = await self._environments.TakeTurn(asked, timeout=self._wanted.item_timeout + _GRACE)
        rollout.state.CopyFrom(answer.state)
        rollout.messages.extend(answer.messages)
        return bool(answer.messages)

    async def _score(self, group: Group) -> None:
        asked = reward_pb2.ScoreRolloutsRequest(
            run=_RUN,
            group_id=group.number,
            environment=self._wanted.environment,
            args=self._args,
            example=group.example,
            rollouts=group.rollouts,
            item_timeout=_duration(self._wanted.item_timeout),
        )
        try:
            answer = await self._rewards.ScoreRollouts(asked, timeout=2 * self._wanted.item_timeout + _GRACE)
        except DeadlineError as error:  # all else another group would meet as well
            group.errors = [error.message] * len(group.rollouts)
            return
        if [result.rollout_id for result in answer.results] != [rollout.rollout_id for rollout in group.rollouts]:
            raise DataLossError(
                f"environment {self._wanted.environment}: the reward service answered about other rollouts, or in "
                "another order; `surogate reward check` says more"
            )
        for result in answer.results:
            if result.HasField("score") and math.isfinite(result.score.reward):
                group.scores[result.rollout_id] = result.score
            else:
                group.errors.append(_problem(result))


def _from_dataset(wanted: Evaluation, error: UnimplementedError) -> list[reward_pb2.Example]:
    path = wanted.args.get("dataset")
    if not isinstance(path, str):
        raise usage("--set", f"{error.message}: give --set dataset=FILE") from error
    args = DatasetArgs.model_validate({key: wanted.args[key] for key in wanted.args.keys() & DatasetArgs.model_fields})
    return [to_example(args, number, row) for number, row in enumerate(read_rows(path)[: wanted.examples], start=1)]


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration


def _problem(result: reward_pb2.RolloutResult) -> str:
    if result.HasField("score"):
        return f"the reward is {result.score.reward}"
    error: SurogateError = from_status(result.error)
    return error.message or "neither a score nor an error"
