"""`exact-match`: the user's own prompts and answers from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from reward_svc.environments.arguments import bad_argument
from reward_svc.environments.base import Environment, EnvironmentArgs, Split
from reward_svc.environments.dataset import column, read_rows
from reward_svc.environments.splits import rng_for, split_rows
from reward_svc.rewards.normalise import Normalisation, normalise
from surogate.errors import InvalidInputError
from surogate.v1 import common_pb2, reward_pb2

_Row = tuple[int, Any, str]  # row number from 1, prompt, answer


class ExactMatchArgs(EnvironmentArgs):
    """Arguments of `exact-match`."""

    dataset: str
    """File with prompts and answers, on the reward service's machine: .jsonl, .json or .csv."""
    eval_dataset: str | None = None
    """File with held-out prompts; unset means that a tenth of `dataset`, at most `eval_examples`, is held out."""
    prompt_field: str = "prompt"
    """Column with the prompt: a text, or a list of messages `{role, content}`."""
    answer_field: str = "answer"
    """Column with the answer."""
    normalise: tuple[Normalisation, ...] = Field(("strip",), alias="normalize")
    """What is evened out on both sides before they are compared, in this order; see docs/custom-rewards.md."""
    answer_prefix: str | None = Field(None, min_length=1)
    """Compare what follows the last occurrence of this in the completion (`####`); a completion without it is wrong."""
    match: Literal["exact", "contains"] = "exact"
    """exact: they are equal. contains: the answer is somewhere in the completion."""

    model_config = EnvironmentArgs.model_config | {"populate_by_name": True}


class ExactMatch(Environment[ExactMatchArgs]):
    """Rewards 1 when completion and answer agree after normalisation, else 0."""

    id = "exact-match"
    description = "Answer like the dataset. Reward: 1 when completion and answer agree after normalisation, else 0."
    args_model = ExactMatchArgs

    def examples(self, args: ExactMatchArgs, split: Split, seed: int) -> Iterator[reward_pb2.Example]:
        """Yields the dataset's rows, shuffled by seed."""
        rows = _rows(args, split)
        rng_for(self.id, split, seed).shuffle(rows)
        limit = args.num_examples if split is Split.TRAIN else args.eval_examples
        for number, prompt, answer in rows[:limit]:
            yield reward_pb2.Example(id=f"row-{number}", prompt=_messages(args, prompt, number), answer=answer)

    def score(self, args: ExactMatchArgs, example: reward_pb2.Example, rollout: reward_pb2.Rollout) -> reward_pb2.Score:
        """Compares the completion with `example.answer`."""
        expected = normalise(example.answer, args.normalise)
        if not expected:
            raise InvalidInputError("exact-match needs example.answer, not empty after normalisation")
        given = rollout.completion
        if args.answer_prefix is not None:
            _, found, given = given.rpartition(args.answer_prefix)
            if not found:
                return reward_pb2.Score(reward=0.0, explanation=f"no {args.answer_prefix!r} in the completion")
        given = normalise(given, args.normalise)
        right = expected in given if args.match == "contains" else expected == given
        return reward_pb2.Score(reward=float(right))


def _rows(args: ExactMatchArgs, split: Split) -> list[_Row]:
    if args.eval_dataset is not None:
        train = _read(args, args.dataset, "dataset")
        held_out = _read(args, args.eval_dataset, "eval_dataset")
        if split is Split.EVAL:
            return held_out
        prompts = {_key(row) for row in held_out}
        rows = [row for row in train if _key(row) not in prompts]
        if not rows:
            raise bad_argument("dataset", f"every prompt of {args.dataset} is also in {args.eval_dataset}")
        return rows
    return split_rows(_read(args, args.dataset, "dataset"), _key, split, args.eval_examples)


def _read(args: ExactMatchArgs, path: str, key: str) -> list[_Row]:
    rows = read_rows(path, key)
    prompts = column(rows, args.prompt_field, "prompt_field")
    answers = column(rows, args.answer_field, "answer_field")
    return [
        (number, prompt, answer if isinstance(answer, str) else json.dumps(answer))
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1)
    ]


def _key(row: _Row) -> str:
    return row[1] if isinstance(row[1], str) else json.dumps(row[1], sort_keys=True)


def _messages(args: ExactMatchArgs, prompt: Any, number: int) -> list[common_pb2.ChatMessage]:
    if isinstance(prompt, str):
        return args.messages(prompt)
    if not isinstance(prompt, list) or not prompt:
        raise bad_argument("prompt_field", f"row {number}: expected a text or a list of messages")
    messages = [_message(item, number) for item in prompt]
    if args.system_prompt and messages[0].role != "system":
        messages.insert(0, common_pb2.ChatMessage(role="system", content=args.system_prompt))
    return messages


def _message(item: Any, number: int) -> common_pb2.ChatMessage:
    if isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str):
        return common_pb2.ChatMessage(role=item["role"], content=item["content"])
    raise bad_argument("prompt_field", f"row {number}: each message needs the texts `role` and `content`")
