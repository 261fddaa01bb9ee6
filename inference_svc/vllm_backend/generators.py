"""Requests with a seed of their own, on CPU: a step that throws their tokens away must not move their generators.

A prompt that is computed over several steps (a long one, or many of them at once after a push took the keys and values
away) is sampled from in each, and what came too early is discarded. vLLM turns the generator back afterwards, which
CUDA generators can and CPU generators refuse: the engine would die.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def spare_discarded(runner: Any) -> None:
    """Makes a model runner on CPU keep generators of discarded tokens out of sampling, instead of turning them back.

    The tokens are drawn from the default generator then, which no request depends on.
    """
    runner.sample_tokens = _sparing(runner, runner.sample_tokens)


def _sparing(runner: Any, sample_tokens: Callable[..., Any]) -> Callable[..., Any]:
    def sample(*args: Any, **kwargs: Any) -> Any:
        generators = runner.input_batch.generators
        discarded = np.flatnonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs]).tolist()
        spared = {index: generators.pop(index) for index in discarded if index in generators}
        try:
            return sample_tokens(*args, **kwargs)
        finally:
            generators.update(spared)

    return sample
