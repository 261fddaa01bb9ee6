"""Tokens a second of supervised training on this machine's CPU against TRL's SFTTrainer, by turns in one run.

Same model, text, packed length, rows, optimiser and threads; each measurement is a process of its own. TRL packs by
`bfd`, which keeps documents apart as we do, or by `wrapped`, which does not: whichever is faster counts.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.bench.programs import last_line
from tests.bench.table import Cell, Options, Table
from tests.helpers.models.tiny import make_tiny_model

SYSTEMS = ("ours", "bfd", "wrapped")
AIM = 1.5
"""Our tokens a second over TRL's."""
GEMM_AIM = 0.85
"""In float32, where products bound it: share of the rate of the machine's own products."""
WARM = 1
SECONDS = 1800.0


@dataclass(frozen=True)
class Model:
    """A Qwen3 of this many layers and this width; about a third of a small model is its vocabulary."""

    layers: int
    hidden: int
    vocabulary: int
    tokens: int
    """Tokens of a step."""
    large: bool = False


MODELS = (Model(6, 224, 16_384, 4096), Model(18, 512, 32_768, 2048, large=True))
TINY = Model(2, 64, 512, 256)


@dataclass(frozen=True)
class Case:
    """One row."""

    model: Model
    sequence: int
    lora: bool
    dtype: str
    steps: int
    """Steps that count."""

    def flags(self) -> list[str]:
        numbers = {
            "sequence": self.sequence,
            "rows": self.model.tokens // self.sequence,
            "steps": WARM + self.steps + 1,  # the first is part of the start
            "dtype": self.dtype,
        }
        flags = [part for name, value in numbers.items() for part in (f"--{name}", str(value))]
        return flags + (["--lora"] if self.lora else [])


COLUMNS = ("parameters", "training", "dtype", "packed to", "tokens/s", "TRL tokens/s", "TRL packs by", "ratio", "aim")
COLUMNS += ("MB", "TRL MB", "first step, s", "TRL first step, s", "of GEMM rate", "GEMM aim")


async def run(options: Options) -> Table:
    """Every model, length, kind of training and format."""
    return Table(COLUMNS, await measure(cases(options.quick), options.rounds or 1))


def cases(quick: bool = False) -> list[Case]:
    """Without bfloat16 on a CPU that has no such products, where a step of TRL's would take minutes."""
    if quick:
        return [Case(TINY, 128, False, "float32", 1)]
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return [
        Case(model, sequence, lora, dtype, 2 if model.large else 5)
        for model in MODELS
        for dtype in (("float32", "bfloat16") if has_bfloat16 else ("float32",))
        for lora in (False, True)
        for sequence in (512, 2048)
    ]


async def measure(todo: list[Case], rounds: int) -> list[list[Cell]]:
    """A row for each case."""
    with tempfile.TemporaryDirectory() as name:
        return [await _row(case, rounds, Path(name) / str(case.model.hidden)) for case in todo]


async def _row(case: Case, rounds: int, folder: Path) -> list[Cell]:
    size = _prepare(case, folder)
    found: dict[str, dict[str, list[float]]] = {system: defaultdict(list) for system in SYSTEMS}
    bound, rates = case.dtype == "float32" and case.model.large, []
    for _ in range(rounds):
        if bound:
            rates.append(await _gemm_rate(case, folder))
        for system, values in found.items():
            one = await _steps(case, system, folder)
            pairs = list(zip(one["tokens"], one["seconds"], strict=True))[WARM:]
            values["speed"] += [tokens / seconds for tokens, seconds in pairs]
            values["seconds"] += [seconds / tokens for tokens, seconds in pairs]
            values["first"].append(one["first"])
            values["peak"].append(one["peak"] / 1e6)
    medians = {s: {what: statistics.median(numbers) for what, numbers in v.items()} for s, v in found.items()}
    packing = max(("bfd", "wrapped"), key=lambda system: medians[system]["speed"])
    us, them = medians["ours"], medians[packing]
    row: list[Cell] = [size, "LoRA" if case.lora else "full", case.dtype, case.sequence]
    row += [us["speed"], them["speed"], packing, us["speed"] / them["speed"], AIM, us["peak"], them["peak"]]
    row += [us["first"], them["first"]]
    row += [_flops_a_token(case, folder) * us["speed"] / statistics.median(rates), GEMM_AIM] if bound else [None, None]
    print(json.dumps(dict(zip(COLUMNS, row, strict=True))), file=sys.stderr, flush=True)
    return row


def _prepare(case: Case, folder: Path) -> int:
    """Makes model and text where they are not there yet; returns the number of weights."""
    model = case.model
    text = folder / f"text-{case.sequence}.jsonl"
    if not (folder / "model").is_dir():
        folder.mkdir(parents=True)
        made = make_tiny_model(
            folder / "model",
            layers=model.layers,
            hidden=model.hidden,
            vocab_size=model.vocabulary,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
        )
        (folder / "size").write_text(str(made.num_parameters()))
    if not text.is_file():
        draw = random.Random(case.sequence)
        needed, rows = model.tokens * 12, []
        while needed > 0:
            length = min(max(int(draw.lognormvariate(0, 0.8) * case.sequence / 4), 16), case.sequence - 1)
            rows.append({"text": "".join(draw.choices("abcdefghij klmnop", k=length))})
            needed -= length + 1
        text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return int((folder / "size").read_text())


async def _steps(case: Case, system: str, folder: Path) -> dict[str, Any]:
    begin = time.monotonic()
    line = await last_line("tests.bench.sft_steps", system, str(folder), *case.flags(), seconds=SECONDS)
    found: dict[str, Any] = json.loads(line)
    print(f"{system}: {found['seconds']} in {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    return found


async def _gemm_rate(case: Case, folder: Path) -> float:
    """Operations a second of the step's products, by themselves."""
    return float(await last_line("tests.bench.gemm", str(folder / "model"), str(case.model.tokens), seconds=SECONDS))


def _flops_a_token(case: Case, folder: Path) -> float:
    """Of full training: products alone, and of attention those of documents of a quarter of the packed length."""
    from transformers import AutoModelForCausalLM

    from trainer_svc.worker.device.flops import StepFlops

    model = AutoModelForCausalLM.from_pretrained(folder / "model").requires_grad_(not case.lora)
    length = case.sequence // 4
    return StepFlops(model).of([length], length) / length
