"""How many operations a second this machine makes in products of float32 matrices; prints the number."""

from __future__ import annotations

import time

import torch

SIZES = ((2048, 512, 2048), (2048, 1024, 1024), (1536, 1536, 1536))
REPEATS = 15


def best_rate() -> float:
    """The fastest of a few products of the size that training has."""
    rates = []
    for rows, inner, columns in SIZES:
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        for _ in range(REPEATS):
            begin = time.perf_counter()
            left @ right
            rates.append(2 * rows * inner * columns / (time.perf_counter() - begin))
    return max(rates)


if __name__ == "__main__":
    print(best_rate())
