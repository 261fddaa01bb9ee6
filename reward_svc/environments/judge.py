"""`judge`: a language model scores completions by a rubric, each alone or all of a group against each other."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Self

import prometheus_client
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from reward_svc.judges.endpoint import Endpoint, JudgeError, Reply, sampling_params
from reward_svc.judges.verdict import (
    DEFAULT_RUBRIC,
    UnreadableError,
    Verdict,
    as_dict,
    once_more,
    question,
    read_verdicts,
)
from surogate.config.types import API_KEY_VARIABLE, JudgeUrl
from surogate.errors import SurogateError
from surogate.reward.prompts import DatasetArgs, DatasetEnvironment
from surogate.telemetry.metrics import REGISTRY
from surogate.v1 import reward_pb2

TOKENS = prometheus_client.Counter(
    "surogate_reward_judge_tokens",
    "Tokens that judges were given (input) and made (output)",
    ("model", "direction"),
    registry=REGISTRY,
)
_MAX_ROOMS = 256


class Cost(BaseModel):
    """What a judge's tokens cost, in any currency."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input_per_million: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Price of a million tokens that the judge is given."""
    output_per_million: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Price of a million tokens that it makes."""

    def of(self, reply: Reply) -> float | None:
        """The price of a reply; None if no prices are given."""
        if self.input_per_million is None and self.output_per_million is None:
            return None
        given, made = self.input_per_million or 0.0, self.output_per_million or 0.0
        return (reply.input_tokens * given + reply.output_tokens * made) / 1e6


class JudgeArgs(DatasetArgs):
    """Arguments of `judge`."""

    base_url: tuple[JudgeUrl, ...] = Field(min_length=1)
    """Where the judge is: `https://…/v1` that speaks OpenAI's chat completions, or `grpc://HOST:PORT` of an inference
    service of ours (`grpcs` with TLS). Several share the requests."""
    model: str | None = None
    """Model that judges; needed but for grpc."""
    api_key_var: str = Field("RULER_JUDGE_API_KEY", pattern=API_KEY_VARIABLE)
    """Environment variable of the reward service that holds the key; its name ends in _API_KEY. Unset: none is sent."""
    rubric: str = Field(DEFAULT_RUBRIC, min_length=1)
    """What makes an answer good."""
    relative: bool = False
    """Show the judge all completions of a group at once, to be compared, rather than one at a time."""
    request_timeout: float = Field(120.0, gt=0, le=3600)
    """Longest time for a request and its repeats, in seconds."""
    max_retries: int = Field(4, ge=0, le=20)
    """Repeats of a request that failed, with growing pauses."""
    max_retries_on_parse_error: int = Field(2, ge=0, le=10)
    """Times that the judge is asked again when its answer cannot be read."""
    max_concurrent: int = Field(32, ge=1, le=1024)
    """Requests to the judge at once."""
    sampling: dict[str, Any] = Field({})
    """temperature, max_tokens and so on of the request."""
    extra_body: dict[str, Any] = Field({})
    """Further fields of the request."""
    cost: Cost = Cost()
    """Prices, for the component `cost`."""

    @field_validator("base_url", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        grpc = [url.startswith("grpc") for url in self.base_url]
        if self.model is None and not all(grpc):
            raise ValueError("model is required for an http(s) endpoint")
        if any(grpc):
            sampling_params({**self.sampling, **self.extra_body})
        return self

    @property
    def endpoint(self) -> Endpoint:
        """The judge, with its key."""
        return Endpoint(
            urls=self.base_url,
            model=self.model,
            key=os.environ.get(self.api_key_var),
            key_name=self.api_key_var,
            timeout=self.request_timeout,
            max_retries=self.max_retries,
            sampling=self.sampling,
            extra_body=self.extra_body,
        )


class Judge(DatasetEnvironment[JudgeArgs]):
    """Rewards the judge's score, from 0 to 1. Completions that are equal are judged once."""

    id = "judge"
    description = "A language model judges by a rubric, alone or relative within a group. Reward: its score, 0 to 1."
    args_model = JudgeArgs
    deterministic = False

    def __init__(self) -> None:
        self._rooms: dict[tuple[object, ...], asyncio.Semaphore] = {}
        self._turn = itertools.count()

    async def score_group(
        self, args: JudgeArgs, example: reward_pb2.Example, rollouts: Sequence[reward_pb2.Rollout]
    ) -> list[reward_pb2.Score | SurogateError]:
        """Asks the judge: about all rollouts at once, or about each."""
        keys = [json.dumps(_shown(rollout)) for rollout in rollouts]
        counts = Counter(keys)
        batches = [list(counts)] if args.relative else [[key] for key in counts]
        judged = await asyncio.gather(*(self._judge(args, example, batch, counts) for batch in batches))
        found = {key: outcome for outcomes in judged for key, outcome in outcomes.items()}
        return [found[key] for key in keys]

    async def _judge(
        self, args: JudgeArgs, example: reward_pb2.Example, keys: Sequence[str], counts: Mapping[str, int]
    ) -> dict[str, reward_pb2.Score | SurogateError]:
        """The outcome for each of the answers (as JSON) that are judged together."""
        try:
            async with self._room(args):
                verdicts, reply = await self._verdicts(args, example, [json.loads(key) for key in keys])
        except JudgeError as error:
            return dict.fromkeys(keys, error)
        share = 1 / sum(counts[key] for key in keys)
        return {key: _score(args, verdict, reply, share) for key, verdict in zip(keys, verdicts, strict=True)}

    async def _verdicts(
        self, args: JudgeArgs, example: reward_pb2.Example, answers: Sequence[object]
    ) -> tuple[list[Verdict], Reply]:
        """Asks until the answer can be read; the reply's tokens are those of all the tries."""
        endpoint, messages = args.endpoint, question(args.rubric, example, answers)
        spent, problem = Reply(""), UnreadableError("")
        for _ in range(args.max_retries_on_parse_error + 1):
            reply = await endpoint.ask(messages, next(self._turn))
            _count(args, reply)
            spent = Reply("", spent.input_tokens + reply.input_tokens, spent.output_tokens + reply.output_tokens)
            try:
                return read_verdicts(reply.text, len(answers)), spent
            except UnreadableError as error:
                problem = error
                messages = [*messages[:2], *once_more(reply.text, error)]
        raise JudgeError(
            f"the judge's answer could not be read, {args.max_retries_on_parse_error + 1} times: {problem}"
        )

    def _room(self, args: JudgeArgs) -> asyncio.Semaphore:
        if len(self._rooms) >= _MAX_ROOMS:
            self._rooms.clear()
        key = (args.base_url, args.model, args.max_concurrent)
        return self._rooms.setdefault(key, asyncio.Semaphore(args.max_concurrent))


def _shown(rollout: reward_pb2.Rollout) -> object:
    """What the judge sees of a rollout: the completion, or the conversation of an episode."""
    return [as_dict(message) for message in rollout.messages] or rollout.completion


def _score(args: JudgeArgs, verdict: Verdict, reply: Reply, share: float) -> reward_pb2.Score:
    """The verdict with a rollout's share of what it cost to find."""
    score = reward_pb2.Score(reward=verdict.score, explanation=verdict.reason)
    score.components["input_tokens"] = reply.input_tokens * share
    score.components["output_tokens"] = reply.output_tokens * share
    cost = args.cost.of(reply)
    if cost is not None:
        score.components["cost"] = cost * share
    return score


def _count(args: JudgeArgs, reply: Reply) -> None:
    TOKENS.labels(args.model or "", "input").inc(reply.input_tokens)
    TOKENS.labels(args.model or "", "output").inc(reply.output_tokens)
