"""Tokens a second through the inference service over those of vLLM called directly, in one run.

Both engines have the same model and arguments and live throughout; rounds alternate, so that whatever else the machine
does meets both alike. `python -m tests.bench.bench_generate [--json]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.helpers.inference import replica
from tests.helpers.tiny import make_tiny_model


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Medians of tokens/s over the rounds, and the median of the rounds' ratios."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        size = make_tiny_model(model, layers=options.layers, hidden=options.hidden).num_parameters()
        async with replica(
            Path(folder), model, "--max-num-seqs", "128", *_lora(options), threads=options.threads
        ) as served:
            llm, adapter = await _direct(model, options)
            rates: dict[str, list[float]] = {"direct": [], "grpc": []}
            for index in range(options.rounds + 1):
                direct = await _rate(options, lambda seed: _call(llm, adapter, options, seed))
                grpc = await _rate(
                    options, lambda seed: served.generate(_prompt(seed), options.group, seed=seed, **_length(options))
                )
                if index:  # the first round warms both up
                    rates["direct"].append(direct)
                    rates["grpc"].append(grpc)
            llm.shutdown(timeout=0)
    ratios = [grpc / direct for grpc, direct in zip(rates["grpc"], rates["direct"], strict=True)]
    return {
        "parameters": size,
        "direct_tokens_per_second": statistics.median(rates["direct"]),
        "grpc_tokens_per_second": statistics.median(rates["grpc"]),
        "ratio": statistics.median(ratios),
        "rounds": options.rounds,
    }


async def _direct(model: Path, options: argparse.Namespace) -> tuple[Any, Any]:
    """vLLM with the arguments of the service, and the adapter that the service's requests carry."""
    from inference_svc import environment
    from inference_svc.options import EngineOptions
    from inference_svc.settings import InferenceSettings

    environment.prepare(InferenceSettings())
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from inference_svc.vllm_backend.loading import load_engine

    engine, _ = await load_engine(
        EngineOptions(str(model), dtype="float32", max_num_seqs=128, enable_lora=options.lora)
    )
    return engine._llm, engine._adapter


async def _call(llm: Any, adapter: Any, options: argparse.Namespace, seed: int) -> None:
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        n=options.group,
        seed=seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **_length(options),
    )
    async for _ in llm.generate(tokens_input(_prompt(seed)), params, f"bench-{time.time_ns()}", lora_request=adapter):
        pass


async def _rate(options: argparse.Namespace, call: Any) -> float:
    start = time.perf_counter()
    await asyncio.gather(*[call(1000 * (index + 1)) for index in range(options.prompts)])
    return float(options.prompts * options.group * options.tokens / (time.perf_counter() - start))


def _prompt(seed: int) -> list[int]:
    return [10 + (seed + index) % 200 for index in range(48)]


def _length(options: argparse.Namespace) -> dict[str, int]:
    return {"max_tokens": options.tokens, "min_tokens": options.tokens}


def _lora(options: argparse.Namespace) -> list[str]:
    return [] if options.lora else ["--no-enable-lora"]


def main() -> None:
    """Prints the result, as a table or with --json as one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of either engine")
    parser.add_argument("--lora", action=argparse.BooleanOptionalAction, default=True)
    result = asyncio.run(run(parser.parse_args()))
    if "--json" in sys.argv:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:28} {value:,.3f}" if isinstance(value, float) else f"{name:28} {value:,}")


if __name__ == "__main__":
    main()
