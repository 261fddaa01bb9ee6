"""The same numbers each time: seeds, threads, and random state as tensors."""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def set_up(seed: int) -> None:
    """Seeds every generator and asks torch for deterministic algorithms, with a warning where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads what it has not written, and filling it costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def rng_state() -> dict[str, torch.Tensor]:
    """State of torch's generators, by device; nothing else is drawn from while training."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng_state(state: dict[str, torch.Tensor], rank: int = 0) -> None:
    """Undoes what was drawn since `rng_state`, as far as the state of this rank was kept."""
    if key("cpu", rank) in state:
        torch.set_rng_state(state[key("cpu", rank)])
    if key("cuda", rank) in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[key("cuda", rank)])


def key(device: str, rank: int) -> str:
    """Name of the state of a rank's device among those of all ranks."""
    return device if rank == 0 else f"{device}.{rank}"
