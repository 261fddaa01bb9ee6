"""Generating the rollouts of one prompt, on whichever replica can."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from orchestrator_svc.grpo.groups import Rollout
from orchestrator_svc.grpo.rollouts.replicas import Replica, Replicas
from surogate.errors import (
    BusyError,
    CancelledError,
    DataLossError,
    DeadlineError,
    SurogateError,
    UnavailableError,
)
from surogate.v1 import common_pb2, inference_pb2

MAX_BUSY_WAIT = 30.0
"""Longest pause, in seconds, before a replica that is full is asked again."""

MAX_FAILURES = 8
"""Replicas that may fail one request before it is given up."""

STALE_POLICY = "STALE_POLICY"


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate."""

    request_id: str
    """Also the prefix of the rollouts' ids."""
    prompt: list[int]
    n: int
    sampling: common_pb2.SamplingParams
    min_version: int


class Generator:
    """Generates groups over the replicas."""

    def __init__(self, replicas: Replicas, *, timeout: float) -> None:
        """`timeout` (`client.timeout`) is the deadline of one call, and of all the attempts together, in seconds."""
        self._replicas = replicas
        self._timeout = timeout

    async def generate(self, request: GenerationRequest) -> list[Rollout]:
        """The completed rollouts, of `request.n` at the most: those that the engine gave up are left out.

        Raises:
            DeadlineError: Not done within the timeout.
            DataLossError: The answer is not what was asked for.
            SurogateError: No replica could, or all are lost.
        """
        deadline = time.monotonic() + self._timeout
        failures = 0
        while True:
            try:
                async with self._replicas.lease(request.n) as replica:
                    response = await self._call(replica, request, deadline)
                return _rollouts(request, response)
            except BusyError as error:
                await _pause(min(error.retry_after, MAX_BUSY_WAIT), deadline, error)
            except SurogateError as error:
                failures += 1
                if not _elsewhere(error) or failures > MAX_FAILURES:
                    raise
                await _pause(0.02, deadline, error)

    async def _call(
        self, replica: Replica, request: GenerationRequest, deadline: float
    ) -> inference_pb2.GenerateRolloutsResponse:
        stub = replica.stub
        if stub is None:
            raise UnavailableError(f"{replica.worker.name} went away")
        message = inference_pb2.GenerateRolloutsRequest(
            request_id=request.request_id,
            prompt_token_ids=request.prompt,
            n=request.n,
            sampling=request.sampling,
            min_policy_version=request.min_version,
        )
        try:
            return await stub.GenerateRollouts(message, timeout=max(deadline - time.monotonic(), 0.001))
        except SurogateError as error:
            if _elsewhere(error):
                self._replicas.doubt(replica, stub)
            raise


def _elsewhere(error: SurogateError) -> bool:
    """Whether another replica, or the same one later, may do what this one did not."""
    return isinstance(error, UnavailableError | CancelledError) or error.reason == STALE_POLICY


async def _pause(seconds: float, deadline: float, error: SurogateError) -> None:
    if time.monotonic() + seconds >= deadline:
        raise DeadlineError(f"no replica generated within client.timeout; the last one said: {error}") from error
    await asyncio.sleep(seconds)


def _rollouts(request: GenerationRequest, response: inference_pb2.GenerateRolloutsResponse) -> list[Rollout]:
    if len(response.completions) != request.n:
        raise DataLossError(f"{len(response.completions)} completions came for a request of {request.n}")
    kept = [
        (index, completion)
        for index, completion in enumerate(response.completions)
        if completion.finish_reason != common_pb2.FINISH_REASON_ABORTED
    ]
    return [_rollout(f"{request.request_id}-{index:04d}", completion) for index, completion in kept]


def _rollout(rollout_id: str, completion: inference_pb2.Completion) -> Rollout:
    rollout = Rollout(
        rollout_id=rollout_id,
        token_ids=np.array(completion.token_ids, np.int32),
        logprobs=np.array(completion.logprobs, np.float32),
        finish_reason=completion.finish_reason,
        spans=list(completion.policy_spans),
    )
    for wrong, problem in _PROBLEMS:
        if wrong(rollout):
            raise DataLossError(f"rollout {rollout_id}: {problem}")
    return rollout


_PROBLEMS: tuple[tuple[Callable[[Rollout], bool], str], ...] = (
    (lambda r: not len(r.token_ids), "has no tokens"),
    (lambda r: len(r.token_ids) != len(r.logprobs), "has not one logprob for each token"),
    (lambda r: not bool(np.isfinite(r.logprobs).all()), "has a logprob that is not finite"),
    (lambda r: sum(s.num_tokens for s in r.spans) != len(r.token_ids), "has policy spans that do not cover its tokens"),
)
"""What can be wrong with a completion, in the order in which it is looked for."""
