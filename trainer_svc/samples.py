"""A step's samples as they come in: bounded, checked, and brought into one order."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import numpy as np
import xxhash

from surogate.errors import InvalidInputError
from surogate.v1 import trainer_pb2 as trainer

MAX_LOGPROB = 1e-3
"""Logprobs are at most 0; rounding may lift them this far."""


@dataclass(frozen=True)
class StepLimits:
    """What a step may bring."""

    max_samples: int
    """Most samples."""
    max_tokens: int
    """Most tokens over all samples."""
    vocab_size: int
    """Token ids are below it; 0 if not known."""
    max_sequence_length: int
    """Most tokens of a sample; 0 if not known."""


@dataclass(frozen=True)
class StepSamples:
    """A step as it will be trained on."""

    step: int
    """Number of the step."""
    samples: list[trainer.TrainingSample]
    """Sorted by id, so that the order of arrival changes nothing."""
    digest: str
    """Of the samples' content: equal digests are the same step."""


async def receive_step(
    requests: AsyncIterator[trainer.TrainStepRequest],
    accept_header: Callable[[trainer.TrainStepHeader], StepLimits],
) -> StepSamples:
    """Collects a TrainStep stream. Raises InvalidInputError for what is wrong with it.

    `accept_header` sees the first message, and may refuse the step before the rest is taken in.
    """
    header: trainer.TrainStepHeader | None = None
    collected: dict[str, trainer.TrainingSample] = {}
    limits = StepLimits(0, 0, 0, 0)
    num_tokens = 0
    async for request in requests:
        if header is None:
            header = _header(request)
            limits = accept_header(header)
            _check_header(header, limits)
            continue
        if not request.HasField("samples"):
            raise _wrong("TrainStep takes one header, first, and then samples")
        for sample in request.samples.samples:
            _check_sample(sample, limits)
            num_tokens += len(sample.token_ids)
            _check_totals(header, collected, sample, num_tokens, limits)
            collected[sample.sample_id] = sample
    if header is None:
        raise _wrong("TrainStep got no message; the first is the header")
    return _complete(header, collected)


def _header(request: trainer.TrainStepRequest) -> trainer.TrainStepHeader:
    if not request.HasField("header"):
        raise _wrong("the first message of TrainStep must be the header")
    return request.header


def _check_header(header: trainer.TrainStepHeader, limits: StepLimits) -> None:
    if not 1 <= header.num_samples <= limits.max_samples:
        raise _wrong(f"header.num_samples is {header.num_samples}; a step has 1 to {limits.max_samples} samples")


def _check_totals(
    header: trainer.TrainStepHeader,
    collected: dict[str, trainer.TrainingSample],
    sample: trainer.TrainingSample,
    num_tokens: int,
    limits: StepLimits,
) -> None:
    if sample.sample_id in collected:
        raise _wrong(f"sample {sample.sample_id!r} is twice in step {header.step}")
    if len(collected) == header.num_samples:
        raise _wrong(f"step {header.step} has more samples than the {header.num_samples} of its header")
    if num_tokens > limits.max_tokens:
        raise _wrong(
            f"step {header.step} has more than {limits.max_tokens} tokens; use a smaller batch_size, or raise the "
            "trainer's max_step_tokens"
        )


def _complete(header: trainer.TrainStepHeader, collected: dict[str, trainer.TrainingSample]) -> StepSamples:
    if len(collected) != header.num_samples:
        raise _wrong(f"step {header.step} has {len(collected)} samples; its header says {header.num_samples}")
    samples = [collected[sample_id] for sample_id in sorted(collected)]
    if not any(any(sample.loss_mask) for sample in samples):
        raise _wrong(f"step {header.step} has no token to train on: every loss_mask is false")
    digest = xxhash.xxh3_128()
    for sample in samples:
        data = sample.SerializeToString(deterministic=True)
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return StepSamples(header.step, samples, digest.hexdigest())


def _check_sample(sample: trainer.TrainingSample, limits: StepLimits) -> None:
    problem = _problem(sample, limits)
    if problem:
        raise _wrong(f"sample {sample.sample_id!r}: {problem}")


def _problem(sample: trainer.TrainingSample, limits: StepLimits) -> str | None:
    length = len(sample.token_ids)
    if not sample.sample_id:
        return "sample_id is empty"
    if length < 2:
        return f"has {length} tokens; at least 2 are needed"
    if limits.max_sequence_length and length > limits.max_sequence_length:
        return f"has {length} tokens; train.sequence_len allows {limits.max_sequence_length}"
    if not length == len(sample.loss_mask) == len(sample.sampler_logprobs):
        return (
            f"token_ids, loss_mask and sampler_logprobs have {length}, {len(sample.loss_mask)} and "
            f"{len(sample.sampler_logprobs)} entries; they must have one for each token"
        )
    return _number_problem(sample, limits.vocab_size)


def _number_problem(sample: trainer.TrainingSample, vocab_size: int) -> str | None:
    ids = np.array(sample.token_ids, dtype=np.int64)
    mask = np.array(sample.loss_mask, dtype=np.bool_)
    logprobs = np.array(sample.sampler_logprobs, dtype=np.float32)[mask]
    if ids.min() < 0 or (vocab_size and ids.max() >= vocab_size):
        return f"token ids range from {ids.min()} to {ids.max()}; the model's from 0 to {vocab_size - 1}"
    if mask[0]:
        return "loss_mask is true for the first token, which has no logprob"
    if not np.isfinite(logprobs).all():
        return "sampler_logprobs of trained tokens are not all finite"
    if logprobs.size and logprobs.max() > MAX_LOGPROB:
        return f"a sampler logprob is {logprobs.max():.4g}; logarithms of probabilities are at most 0"
    if not math.isfinite(sample.advantage):
        return f"advantage is {sample.advantage}"
    if not (math.isfinite(sample.temperature) and sample.temperature > 0):
        return f"temperature is {sample.temperature}; it must be above 0"
    penalty = sample.repetition_penalty if sample.HasField("repetition_penalty") else 1.0
    if not (math.isfinite(penalty) and penalty > 0):
        return f"repetition_penalty is {penalty}; it must be above 0"
    return None


def _wrong(message: str) -> InvalidInputError:
    return InvalidInputError(message, reason="INVALID_SAMPLES")
