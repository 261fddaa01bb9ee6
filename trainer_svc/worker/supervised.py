"""PT and SFT: next-token loss over the data, step by step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import cached_property

import torch

from surogate.errors import DataLossError
from surogate.telemetry import metrics as names
from trainer_svc.worker.checkpoints.saving import save_checkpoint, save_final
from trainer_svc.worker.data.ahead import ReadAhead, num_threads
from trainer_svc.worker.data.packing import pack
from trainer_svc.worker.data.plan import StepPlan, join_rows
from trainer_svc.worker.data.prepare import SessionData
from trainer_svc.worker.data.store import EncodedData
from trainer_svc.worker.folders.checkpoint_folders import has
from trainer_svc.worker.health import finish_step
from trainer_svc.worker.model.batch import Document, collate
from trainer_svc.worker.model.graphs import MicroBatchGraphs
from trainer_svc.worker.optim.watch import TOKENS_PER_WEIGHT, epochs_for
from trainer_svc.worker.quantized.state import count_parameters
from trainer_svc.worker.session import TrainingSession
from trainer_svc.worker_protocol import Reporter

EVAL_LOSS = "eval/loss"
EVAL_PERPLEXITY = "eval/perplexity"


class SupervisedRun:
    """A run over `data`. `total_steps` is its length in optimiser steps."""

    def __init__(self, session: TrainingSession, data: SessionData, reporter: Reporter) -> None:
        train = session.train
        self._session = session
        self._data = data
        self._reporter = reporter
        self._plan = StepPlan(
            data.training,
            capacity=train.sequence_len,
            packing=train.sample_packing,
            rows=train.per_device_train_batch_size,
            micro_batches=train.gradient_accumulation_steps * session.ranks.world_size,
            seed=train.train_seed,
        )
        epochs = self._num_epochs() if train.epoch_adjustment else train.num_epochs
        self.total_steps: int = train.max_steps if train.max_steps > 0 else epochs * self._plan.steps_per_epoch
        threads = num_threads(train.dataloader_num_workers, session.policy.device)
        self._batches = ReadAhead(self._read, end=self.total_steps, threads=threads)

    @cached_property
    def _graphs(self) -> MicroBatchGraphs | None:
        """Made with the first step: what gradients look like is settled with the optimiser."""
        return self._session.policy.graphs() if self._session.ranks.world_size == 1 else None

    def run(self) -> bool:
        """Trains to the end and writes the final model; returns whether it was stopped on the way instead."""
        try:
            return self._run()
        finally:
            self._batches.close()

    def _run(self) -> bool:
        session, train = self._session, self._session.train
        while session.step < self.total_steps and not self._ends_early():
            if session.ranks.of_first(self._reporter.stop_requested):
                return True
            metrics = self.train_step()
            last = session.step == self.total_steps
            self._reporter.step(session.step, metrics if last or session.step % train.logging_steps == 0 else {})
            if session.end is not None:
                session.end.step(metrics[names.LOSS])
            if self._data.held_out is not None and (last or session.step % train.eval_steps == 0):
                found = self.evaluate(self._data.held_out)
                self._reporter.evaluation(session.step, found)
                if session.end is not None:
                    session.end.evaluation(found[EVAL_LOSS])
            if train.save_steps and session.step % train.save_steps == 0 and not last:
                self._save()
        self._finish()
        return False

    def _ends_early(self) -> bool:
        """Whether the run ends before its last step, which is said."""
        session = self._session
        reason = None if session.end is None else session.end.reason
        if reason is not None:
            self._reporter.warning(f"early_stop: ends after step {session.step} of {self.total_steps}: {reason}")
        return reason is not None

    def _num_epochs(self) -> int:
        """`epoch_adjustment`: epochs by the size of the model."""
        train, tokens = self._session.train, self._data.training.num_tokens
        parameters = count_parameters(self._session.policy.model)[1]
        epochs = epochs_for(parameters, tokens)
        self._reporter.warning(
            f"train.epoch_adjustment: {epochs} epochs instead of {train.num_epochs}: {TOKENS_PER_WEIGHT} tokens for "
            f"each of {parameters:,} weights, and the data has {tokens:,}"
        )
        return epochs

    def train_step(self) -> dict[str, float]:
        """One optimiser step: the mean loss over all learned tokens of its micro-batches, however they are cut.

        Ranks take turns with the micro-batches; one that has fewer than others goes along with one that counts nothing.
        """
        start = time.perf_counter()
        session, train, ranks = self._session, self._session.train, self._session.ranks
        batches = self._batches.of(session.step)
        learned = sum(len(document.trained) for batch in batches for document in batch)
        session.policy.train(True)
        own, rounds = ranks.share_of(batches), ranks.rounds(batches)
        losses = []
        for turn in range(rounds):
            counts = turn < len(own)
            documents = own[turn] if counts else batches[0]
            batch = collate(
                documents,
                pad_to_multiple_of=train.pad_to_multiple_of,
                padding_side=train.padding_side,
                block=session.policy.block,
            )
            if self._graphs is not None:
                losses.append(self._graphs.backward(batch, learned))
                continue
            with session.policy.last_of_step(turn == rounds - 1):
                loss = -session.policy.summed_logprob(batch) / learned * float(counts)
                shared = loss * ranks.world_size  # gradients are averaged over ranks
                shared.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        found = finish_step(
            session,
            lambda: sum(ranks.gather(float(torch.stack(losses).double().sum()))),
            self._reporter.warning,
        )
        seconds = time.perf_counter() - start
        lengths = [len(document) for batch in batches for document in batch]
        return {
            **found,
            **session.use.of_step(session.step, lengths, learned, seconds),
            names.TOKENS_PER_SECOND: sum(lengths) / seconds,
            names.TIME_TRAIN: seconds,
            names.EPOCH: self._plan.epoch(session.step),
            names.PACKING_EFFICIENCY: self._plan.efficiency,
        }

    def _read(self, step: int) -> list[list[Document]]:
        """Documents of each micro-batch of a step."""
        data = self._data.training
        return [[data[i] for i in batch] for batch in self._plan.micro_batches(step)]

    @torch.no_grad()
    def evaluate(self, data: EncodedData) -> dict[str, float]:
        """Mean loss over all learned tokens of `data`, without dropout."""
        policy, train, ranks = self._session.policy, self._session.train, self._session.ranks
        policy.train(False)
        batches = eval_batches(data, train.sequence_len, train.per_device_train_batch_size)
        own, total, learned = ranks.share_of(batches), 0.0, 0
        for turn in range(ranks.rounds(batches)):
            counts = turn < len(own)
            logprobs, _ = policy.logprobs(collate([data[i] for i in (own[turn] if counts else batches[0])]))
            total -= float(logprobs.double().sum()) * counts
            learned += len(logprobs) * counts
        policy.train(True)
        shares = ranks.gather((total, learned))
        loss = sum(part for part, _ in shares) / max(sum(count for _, count in shares), 1)
        return {EVAL_LOSS: loss, EVAL_PERPLEXITY: math.exp(min(loss, 700.0))}

    def _save(self) -> None:
        """A checkpoint on the way; that it cannot be written is a warning, for the ones before it are good."""
        try:
            saved = save_checkpoint(self._session, self._reporter.warning)
        except DataLossError as error:
            self._reporter.warning(str(error))
            return
        if saved is not None:
            self._reporter.checkpoint(saved.step, saved.location)

    def _finish(self) -> None:
        """Writes the last checkpoint, unless a resumed run was at its end already, and the final model."""
        session = self._session
        if not session.ranks.of_first(has(session.checkpoint_dir, session.step)):
            saved = save_checkpoint(session, self._reporter.warning)
            if saved is not None:
                self._reporter.checkpoint(saved.step, saved.location)
        self._reporter.checkpoint(session.step, save_final(session), final=True)


def eval_batches(data: EncodedData, capacity: int, rows: int) -> Sequence[list[int]]:
    """Documents of each evaluation batch, packed whatever the configuration says: it changes no loss."""
    return list(join_rows(pack(data.lengths.tolist(), capacity), rows))
