"""The rollouts of a prompt: single completions, or episodes in which the environment answers the model's turns.

An episode is one sequence of tokens: prompt, turn, answer, turn, … Nothing is ever tokenized again: the prompt of the
next turn is what came before, id by id, followed by the ids of the environment's answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from google.protobuf.struct_pb2 import Struct

from orchestrator_svc.grpo.configured.plan import Plan
from orchestrator_svc.grpo.fatal import FATAL
from orchestrator_svc.grpo.groups import ASSISTANT, LENGTH, Cause, Prompt, Rollout
from orchestrator_svc.grpo.rewards.scoring import Environment, Scorer
from orchestrator_svc.grpo.rollouts.generation import GenerationRequest, Generator
from orchestrator_svc.grpo.rollouts.tokenizer import ChatTokenizer
from orchestrator_svc.grpo.tasks import together
from surogate.errors import SurogateError, UnimplementedError
from surogate.v1 import common_pb2, reward_pb2

_CHARACTERS_PER_TOKEN = 64
"""More than a token stands for on average in any text, runs of white space aside."""


class EpisodeBrokenError(SurogateError):
    """The environment did not answer a turn, or its answer cannot be shown to the model."""

    reason = "EPISODE_BROKEN"


@dataclass(frozen=True)
class Wanted:
    """Rollouts of one prompt."""

    prompt: Prompt
    group_id: str
    """Also the prefix of the rollouts' ids."""
    n: int
    purpose: str
    """What the seeds are for: `train`, or an evaluation."""
    ordinal: int
    temperature: float
    min_version: int


@dataclass
class Played:
    """What became of them."""

    environment: Environment
    """Which scores them: of episodes the one that answered."""
    rollouts: list[Rollout]
    cause: Cause = Cause.GENERATION
    """Why rollouts are missing, if some are."""
    problem: str = ""
    """The first thing that went wrong, for people; empty if the engine gave them up."""


class Player:
    """Has the model speak and, where the environment answers, answer again."""

    def __init__(self, plan: Plan, generator: Generator, scorer: Scorer, tokenizer: ChatTokenizer) -> None:
        self._plan = plan
        self._generator = generator
        self._scorer = scorer
        self._tokenizer = tokenizer

    async def play(self, wanted: Wanted) -> Played:
        """The rollouts that came to an end.

        Raises:
            SurogateError: None could be generated, or one of FATAL.
        """
        environment = self._scorer.environment(wanted.prompt.environment)
        if environment.max_turns:
            return await self._episodes(environment, wanted)
        request = GenerationRequest(
            wanted.group_id,
            wanted.prompt.token_ids,
            wanted.n,
            self._sampling(wanted, wanted.purpose, len(wanted.prompt.token_ids)),
            wanted.min_version,
        )
        rollouts = await self._generator.generate(request)
        for rollout, text in zip(rollouts, self._tokenizer.decode([r.token_ids for r in rollouts]), strict=True):
            rollout.text = text
        return Played(self._scorer.environment(environment.key), rollouts)

    async def _episodes(self, environment: Environment, wanted: Wanted) -> Played:
        outcomes = await together(self._one(environment, wanted, index) for index in range(wanted.n))
        played = Played(environment, [item for item in outcomes if isinstance(item, Rollout)])
        failure = next((item for item in outcomes if isinstance(item, SurogateError)), None)
        if failure is not None:
            played.problem = str(failure)
            played.cause = Cause.ENVIRONMENT if isinstance(failure, EpisodeBrokenError) else Cause.GENERATION
        return played

    async def _one(self, environment: Environment, wanted: Wanted, index: int) -> Rollout | SurogateError | None:
        """An episode; or why there is none, None if the engine gave it up."""
        try:
            return await self._episode(environment, wanted, index)
        except FATAL:
            raise
        except SurogateError as error:
            return error

    async def _episode(self, environment: Environment, wanted: Wanted, index: int) -> Rollout | None:
        episode = _Episode(f"{wanted.group_id}-{index:04d}", wanted.prompt)
        for turn in range(1, environment.max_turns + 1):
            spoken = await self._turn(wanted, index, turn, episode)
            if spoken is None:
                return None
            episode.speak(spoken)
            if spoken.truncated:
                break
            answer = await self._ask(environment, wanted, turn, episode)
            episode.state = answer.state
            if not answer.messages or turn == environment.max_turns:
                break
            ids = self._encode(episode, answer.messages) if self._may_fit(answer.messages) else None
            if ids is None or episode.length + len(ids) >= self._plan.context:
                episode.finish_reason = LENGTH
                break
            episode.answer(ids, answer.messages)
        return episode.rollout()

    async def _turn(self, wanted: Wanted, index: int, turn: int, episode: _Episode) -> Rollout | None:
        purpose = wanted.purpose if turn == 1 else f"{wanted.purpose}/turn {turn}"
        sampling = self._sampling(wanted, purpose, episode.length)
        sampling.seed += index  # as completion `index` of a request for all of them
        request = GenerationRequest(
            f"{episode.rollout_id}-turn-{turn}", episode.token_ids, 1, sampling, wanted.min_version
        )
        found = await self._generator.generate(request)
        for rollout, text in zip(found, self._tokenizer.decode([r.token_ids for r in found]), strict=True):
            rollout.text = text
        return found[0] if found else None

    async def _ask(
        self, environment: Environment, wanted: Wanted, turn: int, episode: _Episode
    ) -> reward_pb2.TakeTurnResponse:
        request = reward_pb2.TakeTurnRequest(
            group_id=wanted.group_id,
            rollout_id=episode.rollout_id,
            example=wanted.prompt.example,
            turn=turn,
            messages=episode.messages,
            state=episode.state,
        )
        try:
            return await self._scorer.take_turn(environment, request)
        except SurogateError as error:
            # A service that took another's place need not answer turns: that is no end of the job.
            if isinstance(error, FATAL) and not isinstance(error, UnimplementedError):
                raise
            raise EpisodeBrokenError(f"turn {turn} of rollout {episode.rollout_id}: {error}") from error

    def _may_fit(self, answer: Sequence[common_pb2.ChatMessage]) -> bool:
        """Whether it is worth encoding: what is far too long would hold up everything else meanwhile."""
        size = sum(len(message.role) + len(message.content) for message in answer)
        return len(answer) < self._plan.context and size <= _CHARACTERS_PER_TOKEN * self._plan.context

    def _encode(self, episode: _Episode, answer: Sequence[common_pb2.ChatMessage]) -> list[int]:
        try:
            return self._tokenizer.encode_answer(
                episode.prompt.example.prompt, episode.messages, answer, episode.token_ids[-1]
            )
        except SurogateError as error:
            raise EpisodeBrokenError(f"rollout {episode.rollout_id}: {error}") from error

    def _sampling(self, wanted: Wanted, purpose: str, prompt_tokens: int) -> common_pb2.SamplingParams:
        return self._plan.sampling.params(
            temperature=wanted.temperature,
            purpose=purpose,
            ordinal=wanted.ordinal,
            prompt_tokens=prompt_tokens,
            context=self._plan.context,
        )


@dataclass
class _Episode:
    """An episode as it grows."""

    rollout_id: str
    prompt: Prompt
    messages: list[common_pb2.ChatMessage] = field(default_factory=list)
    state: Struct = field(default_factory=Struct)
    finish_reason: common_pb2.FinishReason.ValueType = common_pb2.FINISH_REASON_UNSPECIFIED
    _ids: list[int] = field(default_factory=list)
    _logprobs: list[float] = field(default_factory=list)
    _answered: list[bool] = field(default_factory=list)
    _spans: list[common_pb2.PolicySpan] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        """All so far, the prompt first."""
        return self.prompt.token_ids + self._ids

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return len(self.prompt.token_ids) + len(self._ids)

    def speak(self, turn: Rollout) -> None:
        """Adds a turn of the model."""
        self._ids += turn.token_ids.tolist()
        self._logprobs += turn.logprobs.tolist()
        self._answered += [False] * len(turn.token_ids)
        self._spans += turn.spans
        self.finish_reason = turn.finish_reason
        self.messages.append(common_pb2.ChatMessage(role=ASSISTANT, content=turn.text))

    def answer(self, ids: Sequence[int], messages: Sequence[common_pb2.ChatMessage]) -> None:
        """Adds what the environment said."""
        self._ids += ids
        self._logprobs += [0.0] * len(ids)
        self._answered += [True] * len(ids)
        self.messages += messages

    def rollout(self) -> Rollout:
        """The whole episode."""
        return Rollout(
            rollout_id=self.rollout_id,
            token_ids=np.array(self._ids, np.int32),
            logprobs=np.array(self._logprobs, np.float32),
            finish_reason=self.finish_reason,
            spans=self._spans,
            text=self.messages[-1].content,
            answered=np.array(self._answered, np.bool_),
            messages=self.messages,
            state=self.state,
        )
