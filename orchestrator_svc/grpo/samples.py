"""From groups with rewards to the samples of a step, and from samples to the messages of TrainStep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from orchestrator_svc.grpo.configured.advantage import Floats
from orchestrator_svc.grpo.groups import Group
from surogate.v1 import trainer_pb2

MESSAGE_TOKENS = 200_000
"""Tokens in one message of TrainStep, about 2 MB; a sample is never split."""


def training_samples(
    group: Group, advantages: Floats, *, repetition_penalty: float = 1.0
) -> list[trainer_pb2.TrainingSample]:
    """One sample per rollout: prompt and what followed, token for token, trained on what the model made."""
    prompt = group.draw.prompt.token_ids
    prompt_mask, prompt_logprobs = [False] * len(prompt), [0.0] * len(prompt)
    samples = []
    for rollout, advantage in zip(group.rollouts, advantages, strict=True):
        sample = trainer_pb2.TrainingSample(
            sample_id=rollout.rollout_id,
            token_ids=prompt + rollout.token_ids.tolist(),
            loss_mask=prompt_mask + rollout.sampled.tolist(),
            sampler_logprobs=prompt_logprobs + rollout.logprobs.tolist(),
            advantage=float(np.float32(advantage)),
            temperature=group.temperature,
            policy_spans=rollout.spans,
        )
        if repetition_penalty != 1.0:
            sample.repetition_penalty = repetition_penalty
        samples.append(sample)
    return samples


def step_messages(
    session_id: str, step: int, samples: Sequence[trainer_pb2.TrainingSample]
) -> Iterator[trainer_pb2.TrainStepRequest]:
    """The stream of TrainStep: the header, then the samples, some in each message."""
    yield trainer_pb2.TrainStepRequest(
        header=trainer_pb2.TrainStepHeader(session_id=session_id, step=step, num_samples=len(samples))
    )
    some: list[trainer_pb2.TrainingSample] = []
    tokens = 0
    for sample in samples:
        if some and tokens + len(sample.token_ids) > MESSAGE_TOKENS:
            yield _message(some)
            some, tokens = [], 0
        some.append(sample)
        tokens += len(sample.token_ids)
    if some:
        yield _message(some)


def _message(samples: Sequence[trainer_pb2.TrainingSample]) -> trainer_pb2.TrainStepRequest:
    return trainer_pb2.TrainStepRequest(samples=trainer_pb2.TrainStepSamples(samples=samples))
