"""The prompts of a job, gathered and tokenized once at the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from orchestrator_svc.grpo.groups import Prompt
from orchestrator_svc.grpo.prompts.dataset import read_examples, split_held_out
from orchestrator_svc.grpo.rewards.scoring import Environment
from orchestrator_svc.grpo.rollouts.tokenizer import ChatTokenizer
from surogate.apart import apart
from surogate.errors import ConfigError, UnimplementedError, Violation
from surogate.structs import from_struct
from surogate.v1 import reward_pb2

MAX_EXAMPLES = 1_000_000
"""Examples taken from one environment and split; an environment may generate without end."""

MAX_BYTES = 2 << 30
"""Bytes of the examples of one environment and split, which the orchestrator keeps in memory."""

HELD_OUT_SHARE = 10
"""Of a dataset that has no split of its own, one prompt in this many is held out, where an evaluation asks for all."""

_Split = reward_pb2.ListExamplesRequest.Split
TRAIN, EVAL = reward_pb2.ListExamplesRequest.SPLIT_TRAIN, reward_pb2.ListExamplesRequest.SPLIT_EVAL


@dataclass(frozen=True)
class Examples:
    """Examples of one environment."""

    train: list[reward_pb2.Example]
    held_out: list[reward_pb2.Example]


@dataclass(frozen=True)
class Wanted:
    """What a job wants of one environment."""

    environment: Environment
    config_key: str
    """Where it stands in the configuration, for messages: `orch.env.0`."""
    train: bool = True
    held_out: int | None = None
    """Held-out examples to evaluate on: 0 means all that there are, None means none."""


async def gather_examples(wanted: Wanted, *, seed: int) -> Examples:
    """The examples of an environment, from its service or from `args.dataset`.

    Raises:
        ConfigError: There are none, or the service has no prompts and args.dataset is not given.
    """
    try:
        train = await _list(wanted, TRAIN, 0, seed) if wanted.train else []
        held_out = [] if wanted.held_out is None else await _list(wanted, EVAL, wanted.held_out, seed)
    except UnimplementedError:
        train, held_out = await apart(partial(_from_dataset, wanted))
    if wanted.train and not train:
        raise _wrong(wanted.config_key, f"environment {wanted.environment.id} has no examples to train on")
    if wanted.held_out is not None and not held_out:
        raise _wrong(wanted.config_key, f"environment {wanted.environment.id} has no held-out examples")
    return Examples(train, held_out)


async def _list(wanted: Wanted, split: _Split.ValueType, count: int, seed: int) -> list[reward_pb2.Example]:
    environment = wanted.environment
    stub = await environment.endpoint.environment()
    request = reward_pb2.ListExamplesRequest(
        environment=environment.id, args=environment.args, split=split, seed=seed, max_examples=count or MAX_EXAMPLES
    )
    found: list[reward_pb2.Example] = []
    size = 0
    call = stub.ListExamples(request)
    try:
        async for example in call:
            found.append(example)
            size += example.ByteSize()
            if len(found) == request.max_examples or size > MAX_BYTES:
                break
    finally:
        call.cancel()  # of a service that would go on
    problem = f"more than {MAX_BYTES >> 20} MiB of examples came" if size > MAX_BYTES else _problem(found)
    if problem:
        raise _wrong(wanted.config_key, f"environment {environment.id}: {problem}")
    return found


def _problem(examples: Sequence[reward_pb2.Example]) -> str:
    """What is wrong with what a service sent; empty if nothing is."""
    seen: set[str] = set()
    for example in examples:
        if not example.prompt:
            return f"the example with the id {example.id[:80]!r} has no prompt"
        if example.id in seen:
            return f"two examples have the id {example.id[:80]!r}"
        seen.add(example.id)
    return ""


def _from_dataset(wanted: Wanted) -> tuple[list[reward_pb2.Example], list[reward_pb2.Example]]:
    key = f"{wanted.config_key}.args.dataset"
    path = from_struct(wanted.environment.args).get("dataset")
    if not isinstance(path, str):
        raise _wrong(
            key, f"the service of environment {wanted.environment.id} only scores; name a file of prompts here"
        )
    examples = read_examples(path, key=key)
    if wanted.held_out is None:
        return examples, []
    return split_held_out(examples, wanted.held_out or max(1, len(examples) // HELD_OUT_SHARE))


@dataclass(frozen=True)
class TooLong:
    """Prompts that leave no room for a completion."""

    count: int
    first: str
    """Key of the first one."""
    first_tokens: int


def tokenize(
    tokenizer: ChatTokenizer, environment: str, examples: Sequence[reward_pb2.Example], *, context: int
) -> tuple[list[Prompt], TooLong | None]:
    """Renders and encodes examples; those that leave no room for a completion of one token are left out.

    Raises:
        ConfigError: All of them are too long, or one is empty.
    """
    encoded = tokenizer.encode_prompts([example.prompt for example in examples])
    prompts = [
        Prompt(environment, example, ids) for example, ids in zip(examples, encoded, strict=True) if len(ids) < context
    ]
    first = next((i for i, ids in enumerate(encoded) if len(ids) >= context), None)
    if any(not ids for ids in encoded):
        raise _wrong("model", "the chat template renders a prompt to no tokens at all")
    if first is None:
        return prompts, None
    too_long = TooLong(len(encoded) - len(prompts), f"{environment}/{examples[first].id}", len(encoded[first]))
    if not prompts:
        raise _wrong(
            "orch.seq_len",
            f"every prompt is too long: {too_long.first} has {too_long.first_tokens} tokens, and prompt and completion "
            f"together may have {context}; raise seq_len (and max_model_len), or use shorter prompts",
        )
    return prompts, too_long


def _wrong(key: str, message: str) -> ConfigError:
    return ConfigError.of([Violation(key, message)])
