"""Seeded requests on CPU: discarded tokens leave a request's generator alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from inference_svc.vllm_backend.generators import spare_discarded

SEEDS = {0: 5, 1: 6}


class Runner:
    """Samples as vLLM's runner does: from each request's generator, turning back those whose token is discarded."""

    def __init__(self) -> None:
        generators = {index: torch.Generator().manual_seed(seed) for index, seed in SEEDS.items()}
        self.input_batch = SimpleNamespace(num_reqs=3, generators=generators)  # the third has no seed
        self.discard_request_mask = SimpleNamespace(np=np.zeros(8, dtype=bool))
        self.fails = False

    def sample_tokens(self, grammar: None) -> list[float]:
        if self.fails:
            raise RuntimeError("the step failed")
        generators = self.input_batch.generators
        drawn = [float(torch.rand(1, generator=generators.get(index))) for index in range(self.input_batch.num_reqs)]
        for index in np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]):
            if index in generators:
                generators[index].set_offset(generators[index].get_offset() - 4)
        return drawn


def test_cpu_generators_cannot_be_turned_back() -> None:
    runner = Runner()
    runner.discard_request_mask.np[0] = True
    with pytest.raises(RuntimeError, match="offset"):
        runner.sample_tokens(None)


def test_a_discarded_token_moves_no_generator() -> None:
    undisturbed = Runner()
    expected = [undisturbed.sample_tokens(None)[:2] for _ in range(2)]
    runner = Runner()
    spare_discarded(runner)
    runner.discard_request_mask.np[:3] = [True, False, True]
    early = runner.sample_tokens(None)
    assert early[1] == expected[0][1], "the others are sampled as ever"
    runner.discard_request_mask.np[:3] = False
    assert runner.sample_tokens(None)[:2] == [expected[0][0], expected[1][1]]


def test_generators_come_back_after_a_failure() -> None:
    runner = Runner()
    spare_discarded(runner)
    runner.discard_request_mask.np[0] = True
    runner.fails = True
    with pytest.raises(RuntimeError, match="the step failed"):
        runner.sample_tokens(None)
    assert set(runner.input_batch.generators) == set(SEEDS)
