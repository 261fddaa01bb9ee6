"""How many operations a second this machine makes in the products of a model's training step; prints the number.

`python -m tests.bench.gemm MODEL TOKENS`: of each linear layer the product forward, that for its input and that for its
weight, by themselves, in float32, with all tokens of the step as rows; each counts as often as the step makes it.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

REPEATS = 4


def rate(model: Path, tokens: int) -> float:
    """Operations of all products over the seconds that they take, each at its fastest."""
    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).modules()
    shapes = Counter(tuple(layer.weight.shape) for layer in layers if isinstance(layer, torch.nn.Linear))
    operations = seconds = 0.0
    for (outputs, inputs), count in shapes.items():
        x, weight, gradient = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(tokens, outputs)
        seconds += count * _fastest(x, weight.T)
        seconds += count * _fastest(gradient, weight)
        seconds += count * _fastest(gradient.T, x)
        operations += count * 3 * 2 * tokens * inputs * outputs
    return operations / seconds


def _fastest(left: torch.Tensor, right: torch.Tensor) -> float:
    found, out = [], torch.empty(left.shape[0], right.shape[1])
    for _ in range(REPEATS):
        begin = time.perf_counter()
        torch.mm(left, right, out=out)
        found.append(time.perf_counter() - begin)
    return min(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=int)
    arguments = parser.parse_args()
    print(rate(arguments.model, arguments.tokens))
