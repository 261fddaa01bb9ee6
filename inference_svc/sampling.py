"""Checks of what a request may ask for. Messages are for the caller."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from inference_svc.engine_api import EngineFacts
from surogate.errors import InvalidInputError, Violation
from surogate.v1 import common_pb2

MAX_COMPLETIONS = 1024
MAX_SEQUENCES = 256
_MAX_STOPS = 16
_SEED_LIMIT = 2**63


def check_count(n: int) -> None:
    """Raises InvalidInputError unless 1 to 1024 completions are asked for."""
    if not 1 <= n <= MAX_COMPLETIONS:
        raise _invalid("n", f"{n} completions are asked for; 1 to {MAX_COMPLETIONS} can be")


def check_ids(ids: Sequence[int], facts: EngineFacts, *, field: str, least: int = 1) -> None:
    """Raises InvalidInputError for too few ids, and for an id outside the vocabulary."""
    if len(ids) < least:
        raise _invalid(field, f"{len(ids)} token ids are given; at least {least} must be")
    if min(ids) < 0 or max(ids) >= facts.vocab_size:
        wrong = next(token for token in ids if not 0 <= token < facts.vocab_size)
        raise _invalid(field, f"token id {wrong} is outside the vocabulary of {facts.vocab_size}")


def check_prompt_length(length: int, facts: EngineFacts, *, field: str) -> None:
    """Raises InvalidInputError unless at least one token fits the context after the prompt."""
    if length >= facts.max_model_len:
        raise _invalid(
            field,
            f"the prompt has {length} tokens; with max_model_len {facts.max_model_len} it may have "
            f"{facts.max_model_len - 1} at most. Shorten it or raise max_model_len",
            reason="PROMPT_TOO_LONG",
        )


def is_temperature(value: float) -> bool:
    """Whether vLLM samples at this temperature: it refuses more than 2, and takes 0.01 for less without a word."""
    return round(value, 6) >= 0.01 and value <= 2  # 0.01 is a little less in float32


_RULES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value == 0 or is_temperature(value), "must be 0, or 0.01 to 2"),
    "max_tokens": (lambda value: value >= 1, "must be at least 1"),
    "min_tokens": (lambda value: value >= 0, "must be 0 or more"),
    "top_p": (lambda value: 0 < value <= 1, "must be above 0 and at most 1"),
    "repetition_penalty": (lambda value: math.isfinite(value) and value > 0, "must be above 0"),
    "seed": (lambda value: 0 <= value < _SEED_LIMIT - MAX_COMPLETIONS, "must be 0 or more and below 2^63 - 1024"),
}


def check_sampling(sampling: common_pb2.SamplingParams, facts: EngineFacts, room: int) -> None:
    """Raises InvalidInputError naming every field that cannot be done; `room` is the tokens left in the context."""
    wrong = [
        Violation(f"sampling.{name}", f"{getattr(sampling, name):g} {why}")
        for name, (holds, why) in _RULES.items()
        if sampling.HasField(name) and not holds(getattr(sampling, name))  # type: ignore[arg-type]
    ]
    most = min(sampling.max_tokens, room) if sampling.HasField("max_tokens") else room
    if sampling.min_tokens > most:
        wrong.append(Violation("sampling.min_tokens", f"{sampling.min_tokens} is more than the {most} that fit"))
    if len(sampling.stop) > _MAX_STOPS or any(not text for text in sampling.stop):
        wrong.append(Violation("sampling.stop", f"takes up to {_MAX_STOPS} strings, none of them empty"))
    if any(not 0 <= token < facts.vocab_size for token in sampling.stop_token_ids):
        wrong.append(Violation("sampling.stop_token_ids", f"has an id outside the vocabulary of {facts.vocab_size}"))
    if wrong:
        raise InvalidInputError("\n".join(map(str, wrong)), violations=wrong)


def check_scoring(ids: Sequence[int], temperature: float, facts: EngineFacts, *, field: str) -> None:
    """Raises InvalidInputError for a sequence that cannot be scored."""
    check_ids(ids, facts, field=field, least=2)
    if len(ids) > facts.max_model_len:
        why = f"{len(ids)} tokens are more than max_model_len {facts.max_model_len}"
        raise _invalid(field, why, reason="PROMPT_TOO_LONG")
    if not is_temperature(temperature):
        raise _invalid("temperature", f"{temperature:g} must be 0.01 to 2")


def _invalid(field: str, description: str, *, reason: str | None = None) -> InvalidInputError:
    violation = Violation(field, description)
    return InvalidInputError(str(violation), violations=[violation], reason=reason)
