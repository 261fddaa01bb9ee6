"""`surogate tokenize`: makes the tokens that a run would train on, tells what they are, and leaves them in the cache.

torch is loaded when flags and configuration are read, so that `--help` and a wrong key answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from surogate.cli.exits import error_lines, exit_code
from surogate.errors import SurogateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surogate.config.train import TrainConfig
    from trainer_svc.worker.data.prepare import SessionData
    from trainer_svc.worker.model.batch import Document

NOT_LEARNT = -100
"""Label of a token that is not learnt, as elsewhere in the field."""

GREEN, PLAIN = "\033[32m", "\033[0m"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    given = _parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        for line in tokenize(given.config, given.overrides, given.samples if given.debug else 0):
            sys.stdout.write(f"{line}\n")
    except SurogateError as error:
        sys.stderr.write("".join(f"{line}\n" for line in error_lines(error)))
        return exit_code(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="surogate tokenize",
        description="Tokenize the data of a train.yaml, say what there is, and keep the tokens for the training run.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="train.yaml of a PT or SFT job")
    parser.add_argument("--debug", action="store_true", help="print samples, token by token, beside their labels")
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="samples to print. Default: 2")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override a key; repeatable"
    )
    return parser


def read_config(path: Path, overrides: Sequence[str]) -> TrainConfig:
    """The configuration as the training command would have it. Raises ConfigError with the place of what is wrong."""
    from surogate.cli.train import local_job
    from surogate.client.jobs import job_documents
    from surogate.config.job import resolve_job

    documents = job_documents("sft", {"train": path}, overrides)
    entries = documents["train"].data.get("datasets") or []
    is_text = isinstance(entries, list) and all(isinstance(e, dict) and e.get("type") == "text" for e in entries)
    config, _ = local_job("pt" if is_text and entries else "sft", documents)
    return resolve_job(config).train


def tokenize(path: Path, overrides: Sequence[str], samples: int) -> Iterator[str]:
    """Prepares the data, and yields the lines that tell of them; first come warnings."""
    train = read_config(path, overrides)
    from trainer_svc.worker.data.prepare import prepare
    from trainer_svc.worker.data.tokenizer import load_tokenizer
    from trainer_svc.worker.model.modeling import load_model_config

    tokenizer = load_tokenizer(train)
    vocab_size = int(load_model_config(train).get_text_config().vocab_size)
    warnings: list[str] = []
    start = time.perf_counter()
    data = prepare(train, tokenizer, vocab_size, warnings.append)
    seconds = time.perf_counter() - start
    yield from (f"warning: {text}" for text in warnings)
    yield from statistics(data, train)
    done = "found in the cache" if data.cached else "tokenized"
    yield f"{done} in {seconds:.1f} s: {data.folder}"
    for index in range(min(samples, len(data.training))):
        yield ""
        yield f"sample {index}"
        yield from token_lines(data.training[index], tokenizer, colour=sys.stdout.isatty())


def statistics(data: SessionData, train: TrainConfig) -> Iterator[str]:
    """What each dataset gave, and what training makes of all of them."""
    from trainer_svc.worker.data.plan import StepPlan

    head = ("dataset", "type", "rows", "held out", "too long", "empty", "samples", "tokens", "learnt", "longest")
    rows = [
        (
            counts.path,
            counts.kind,
            *(f"{number:,}" for number in (counts.rows, counts.held_out, counts.too_long, counts.empty)),
            f"{counts.documents:,}",
            f"{counts.tokens:,}",
            f"{100 * counts.learned / counts.tokens:.1f} %",
            f"{counts.longest:,}",
        )
        for counts in data.counts
    ]
    yield from _table([head, *rows])
    plan = StepPlan(
        data.training,
        capacity=train.sequence_len,
        packing=train.sample_packing,
        rows=train.per_device_train_batch_size,
        micro_batches=train.gradient_accumulation_steps,
        seed=train.train_seed,
    )
    how = "packed" if train.sample_packing else "not packed"
    yield (
        f"{data.training.num_tokens:,} tokens in sequences of {train.sequence_len:,}, {how}: "
        f"{100 * plan.efficiency:.1f} % of the positions used, {plan.steps_per_epoch:,} steps an epoch"
    )
    if data.held_out is not None:
        yield f"held out: {len(data.held_out):,} samples, {data.held_out.num_tokens:,} tokens"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns of one width each; numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def token_lines(document: Document, tokenizer: PreTrainedTokenizerBase, *, colour: bool) -> Iterator[str]:
    """A line a token: position, id, label, text; those that are learnt are marked, and green where `colour`."""
    learnt = set(document.trained.tolist())
    yield "position       id    label    text"
    for position, token in enumerate(document.token_ids.tolist()):
        label, mark = (token, "*") if position in learnt else (NOT_LEARNT, " ")
        line = f"{position:>8} {token:>8} {label:>8} {mark}  {tokenizer.decode([token])!r}"
        yield f"{GREEN}{line}{PLAIN}" if colour and mark == "*" else line


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # what libraries say of accelerators that are not there
    sys.exit(main())
