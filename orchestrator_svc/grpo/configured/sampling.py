"""How tokens are drawn at each step: the temperature by its schedule, and a seed for every prompt that is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import xxhash

from surogate.v1 import common_pb2

_SEED_BITS = 48
"""Completion i of a group uses seed + i; 48 bits leave room for that in any engine's seed type."""


@dataclass(frozen=True)
class TemperatureSchedule:
    """Temperature over the steps of a job: from `start` at the first step to `end` at the last."""

    start: float
    end: float
    shape: Literal["constant", "linear", "cosine"] = "constant"

    def at(self, step: int, max_steps: int) -> float:
        """Temperature of step 1 to `max_steps`, as the float32 that travels; steps outside are clamped to the ends."""
        if self.shape == "constant" or max_steps <= 1:
            return _as_float32(self.start)
        progress = min(max((step - 1) / (max_steps - 1), 0.0), 1.0)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return _as_float32(self.start + (self.end - self.start) * progress)


@dataclass(frozen=True)
class Sampling:
    """The part of the sampling parameters that all rollouts of a job share."""

    seed: int
    schedule: TemperatureSchedule
    max_tokens: int | None = None
    """Largest completion, in tokens; None means up to the context."""
    min_tokens: int = 0
    repetition_penalty: float = 1.0

    def params(
        self, *, temperature: float, purpose: str, ordinal: int, prompt_tokens: int, context: int
    ) -> common_pb2.SamplingParams:
        """Parameters for one prompt: the same ones for the same job seed, purpose ("train", "eval") and ordinal."""
        room = context - prompt_tokens
        params = common_pb2.SamplingParams(
            temperature=temperature,
            max_tokens=min(self.max_tokens or room, room),
            seed=prompt_seed(self.seed, purpose, ordinal),
        )
        if self.min_tokens:
            params.min_tokens = self.min_tokens
        if self.repetition_penalty != 1.0:
            params.repetition_penalty = self.repetition_penalty
        return params


def prompt_seed(seed: int, purpose: str, ordinal: int) -> int:
    """Seed of the group of one drawn prompt: below 2**48, and unrelated to its neighbours'."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{purpose}/{ordinal}".encode()) >> (64 - _SEED_BITS)


def _as_float32(value: float) -> float:
    return common_pb2.SamplingParams(temperature=value).temperature
