"""Tokens a second through the inference service over those of vLLM called directly, in one run.

Both engines have the same model and arguments, LoRA with an adapter among them, and live throughout; rounds take
turns. `direct` is vLLM's `AsyncLLM.generate` in this process with the arguments that the service gives it.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.table import Cell, Options, Table
from tests.helpers.inference import Replica, replica
from tests.helpers.models.tiny import make_tiny_model

AIM = 0.95
"""Tokens a second through gRPC over those of vLLM directly."""

THREADS = 1
"""OMP_NUM_THREADS of either engine: they work by turns, and what waits must not spin."""

PROMPT_TOKENS = 48


@dataclass(frozen=True)
class Case:
    """One row."""

    layers: int
    hidden: int
    """A multiple of 32."""
    prompts: int
    group: int
    """Completions of a prompt."""
    tokens: int
    """Tokens of a completion."""


async def run(options: Options) -> Table:
    """A row for a small model, which the overhead weighs on most, and one for a larger one."""
    cases = (Case(2, 64, 2, 2, 4),) if options.quick else (Case(4, 256, 16, 8, 64), Case(8, 512, 16, 8, 64))
    rounds = options.rounds or (1 if options.quick else 5)
    rows = [await _row(case, rounds) for case in cases]
    columns = ("parameters", "prompts", "group", "tokens", "direct tokens/s", "gRPC tokens/s", "ratio", "aim")
    return Table(columns, rows)


async def _row(case: Case, rounds: int) -> list[Cell]:
    direct: list[float] = []
    grpc: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        size = make_tiny_model(model, layers=case.layers, hidden=case.hidden).num_parameters()
        async with replica(Path(folder), model, "--max-num-seqs", "128", threads=THREADS) as served:
            llm, adapter = await _direct(model)
            for index in range(rounds + 1):
                rates = (
                    await _rate(case, lambda seed: _call_directly(llm, adapter, case, seed)),
                    await _rate(case, lambda seed: _call_service(served, case, seed)),
                )
                if index:  # the first round warms both up
                    direct.append(rates[0])
                    grpc.append(rates[1])
            llm.shutdown(timeout=0)
    ratio = statistics.median(there / here for there, here in zip(grpc, direct, strict=True))
    speeds = (statistics.median(direct), statistics.median(grpc))
    return [size, case.prompts, case.group, case.tokens, *speeds, ratio, AIM]


async def _direct(model: Path) -> tuple[Any, Any]:
    """vLLM with the arguments of the service, and the adapter that the service's requests carry."""
    from inference_svc import environment
    from inference_svc.options import EngineOptions
    from inference_svc.settings import InferenceSettings

    environment.prepare(InferenceSettings())
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    from inference_svc.vllm_backend.loading import load_engine

    engine, _ = await load_engine(EngineOptions(str(model), dtype="float32", max_num_seqs=128))
    return engine._llm, engine._adapter


async def _call_directly(llm: Any, adapter: Any, case: Case, seed: int) -> None:
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        n=case.group,
        seed=seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        max_tokens=case.tokens,
        min_tokens=case.tokens,
    )
    async for _ in llm.generate(tokens_input(_prompt(seed)), params, f"bench-{time.time_ns()}", lora_request=adapter):
        pass


async def _call_service(served: Replica, case: Case, seed: int) -> None:
    response = await served.generate(
        _prompt(seed), case.group, seed=seed, max_tokens=case.tokens, min_tokens=case.tokens
    )
    assert [len(completion.token_ids) for completion in response.completions] == [case.tokens] * case.group


async def _rate(case: Case, call: Callable[[int], Awaitable[None]]) -> float:
    start = time.perf_counter()
    await asyncio.gather(*[call(1000 * (index + 1)) for index in range(case.prompts)])
    return case.prompts * case.group * case.tokens / (time.perf_counter() - start)


def _prompt(seed: int) -> list[int]:
    return [10 + (seed + index) % 200 for index in range(PROMPT_TOKENS)]
