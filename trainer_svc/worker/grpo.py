"""One GRPO step: packed samples in, one optimiser step done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from surogate.errors import InvalidInputError
from surogate.telemetry import metrics as names
from surogate.v1 import trainer_pb2 as trainer
from trainer_svc.worker.data.packing import efficiency, pack
from trainer_svc.worker.data.plan import join_rows
from trainer_svc.worker.health import finish_step
from trainer_svc.worker.loss import LossMetrics, policy_loss
from trainer_svc.worker.model.batch import Document, PackedBatch, collate
from trainer_svc.worker.session import TrainingSession
from trainer_svc.worker_protocol import Reporter


@dataclass(frozen=True)
class Sample:
    """A rollout: its document, and for each token of it the sampler's logprob [n]; one advantage, one temperature."""

    document: Document
    sampler_logprobs: np.ndarray[tuple[int], np.dtype[np.float32]]
    advantage: float
    temperature: float


@dataclass(frozen=True)
class Totals:
    """Of the whole optimiser step: what its micro-batches' losses are normalised by."""

    tokens: int
    samples: int


def train_step(
    session: TrainingSession, messages: Sequence[trainer.TrainingSample], reporter: Reporter
) -> dict[str, float]:
    """Trains on the samples, in the order of their ids, and returns the step's metrics.

    Raises InvalidInputError, with nothing changed, for samples that cannot be trained on.
    """
    start = time.perf_counter()
    samples = read_samples(messages, session.train.sequence_len)
    rows = _rows(samples, session)
    totals = Totals(sum(len(sample.document.trained) for sample in samples), len(samples))
    if totals.tokens == 0:
        raise InvalidInputError("no sample of the step has a token to train on", reason="NOTHING_TO_TRAIN_ON")
    session.policy.train(True)
    loss, entropy, found = _gradients(samples, rows, totals, session)
    metrics = finish_step(session, lambda: loss, reporter.warning)
    seconds = time.perf_counter() - start
    lengths = [len(sample.document) for sample in samples]
    return {
        **(found or {}),
        **metrics,
        **session.use.of_step(session.step, lengths, totals.tokens, seconds),
        names.ENTROPY: entropy / totals.tokens,
        names.TOKENS_PER_SECOND: sum(lengths) / seconds,
        names.TIME_TRAIN: seconds,
        names.PACKING_EFFICIENCY: efficiency(lengths, rows, session.train.sequence_len),
    }


def _gradients(
    samples: Sequence[Sample], rows: Sequence[Sequence[int]], totals: Totals, session: TrainingSession
) -> tuple[float, float, LossMetrics | None]:
    """The step's gradient, micro-batch by micro-batch; returns its loss, sum of entropies and what the loss says.

    Ranks take turns with the micro-batches; one that has fewer than others goes along with one that counts nothing.
    """
    ranks = session.ranks
    batches = [[samples[i] for i in batch] for batch in join_rows(rows, session.train.per_device_train_batch_size)]
    batches = [batch for batch in batches if any(len(sample.document.trained) for sample in batch)]
    own, rounds = ranks.share_of(batches), ranks.rounds(batches)
    parts = []
    for turn in range(rounds):
        counts = turn < len(own)
        with session.policy.last_of_step(turn == rounds - 1):
            part = _backward(own[turn] if counts else batches[0], totals, session, weight=float(counts))
        if counts:
            parts.append(part)
    everybodys = [part for share in ranks.gather(parts) for part in share]
    found = [part[2] for part in everybodys]
    return sum(part[0] for part in everybodys), sum(part[1] for part in everybodys), sum(found[1:], found[0])


def read_samples(messages: Sequence[trainer.TrainingSample], limit: int) -> list[Sample]:
    """The samples as arrays, sorted by id. Raises InvalidInputError for those that cannot be trained on."""
    samples = []
    for message in sorted(messages, key=lambda item: item.sample_id):
        if len(message.token_ids) > limit:
            raise InvalidInputError(
                f"sample {message.sample_id} has {len(message.token_ids)} tokens; train.sequence_len is {limit}"
            )
        if message.HasField("repetition_penalty") and message.repetition_penalty != 1:
            raise InvalidInputError(
                f"sample {message.sample_id} was drawn with repetition_penalty {message.repetition_penalty:g}, which "
                "training does not reproduce; set it to 1"
            )
        document = Document(np.array(message.token_ids, dtype=np.int64), np.array(message.loss_mask, dtype=np.bool_))
        logprobs = np.array(message.sampler_logprobs, dtype=np.float32)
        samples.append(Sample(document, logprobs, message.advantage, message.temperature))
    return samples


def _rows(samples: Sequence[Sample], session: TrainingSession) -> list[list[int]]:
    """Samples of each packed row."""
    lengths = [len(sample.document) for sample in samples]
    if session.train.single_sample_bins:
        return [[index] for index in range(len(samples))]
    return pack(lengths, session.train.sequence_len, window=len(lengths))


def _backward(
    samples: Sequence[Sample], totals: Totals, session: TrainingSession, *, weight: float
) -> tuple[float, float, LossMetrics]:
    """Adds `weight` times one micro-batch's gradient; returns its share of the loss, entropies and the loss's metrics.

    At least one sample has a token to train on.
    """
    train = session.train
    batch = collate(
        [sample.document for sample in samples],
        pad_to_multiple_of=train.pad_to_multiple_of,
        padding_side=train.padding_side,
        keep_apart=train.doc_masking,
        block=session.policy.block,
    )
    columns = _columns(samples, batch.owner.numpy(), session.policy.device)
    logprobs, entropy = session.policy.logprobs(batch, columns.temperature, with_entropy=True)
    assert entropy is not None
    loss, found = policy_loss(
        train.loss,
        logprobs,
        columns.sampler_logprobs,
        columns.advantage,
        torch.ones_like(logprobs, dtype=torch.bool),
        batch.owner.to(logprobs.device),
        reference_logprobs=_reference_logprobs(session, batch, columns.temperature),
        num_tokens=totals.tokens,
        num_samples=totals.samples,
        max_completion_length=train.sequence_len,
    )
    shared = loss * (weight * session.ranks.world_size)  # gradients are averaged over ranks
    shared.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), float(entropy.double().sum()), found.cpu()


@dataclass(frozen=True)
class _Columns:
    """Per trained token, [M]. `temperature` is None when it is 1 everywhere."""

    sampler_logprobs: torch.Tensor
    advantage: torch.Tensor
    temperature: torch.Tensor | None


def _columns(
    samples: Sequence[Sample], owner: np.ndarray[tuple[int], np.dtype[np.int64]], device: torch.device
) -> _Columns:
    sampled = np.concatenate([sample.sampler_logprobs[sample.document.trained] for sample in samples])
    advantage = np.array([sample.advantage for sample in samples], dtype=np.float32)[owner]
    temperature = np.array([sample.temperature for sample in samples], dtype=np.float32)[owner]
    warm = None if (temperature == 1).all() else torch.from_numpy(temperature).to(device)
    return _Columns(torch.from_numpy(sampled).to(device), torch.from_numpy(advantage).to(device), warm)


@torch.no_grad()
def _reference_logprobs(
    session: TrainingSession, batch: PackedBatch, temperature: torch.Tensor | None
) -> torch.Tensor | None:
    """Logprobs [M] under the policy before training: the adapter off, or the copy; None when the loss needs none."""
    if session.reference is not None:
        return session.reference.logprobs(batch, temperature)[0]
    if not session.needs_reference:
        return None
    with session.policy.without_adapter():
        return session.policy.logprobs(batch, temperature)[0]
