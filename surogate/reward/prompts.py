"""Prompts from a dataset of the user's: what most environments that do not generate their own prompts need."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.json_format import ParseDict
from pydantic import AfterValidator

from surogate.errors import UnimplementedError
from surogate.reward.arguments import bad_argument
from surogate.reward.base import Environment, EnvironmentArgs, Split
from surogate.reward.dataset import read_rows
from surogate.reward.splits import rng_for, split_rows
from surogate.structs import from_struct
from surogate.v1 import common_pb2, reward_pb2

Row = Mapping[str, Any]
_Numbered = tuple[int, Row]  # row number from 1


class DatasetArgs(EnvironmentArgs):
    """Arguments of environments whose prompts may come from a file."""

    dataset: str | None = None
    """File with prompts, on the reward service's machine: .jsonl, .json or .csv. Other columns become `fields`."""
    eval_dataset: str | None = None
    """File with held-out prompts; unset means that a tenth of `dataset`, at most `eval_examples`, is held out."""
    prompt_field: str = "prompt"
    """Column with the prompt: a text, or a list of messages `{role, content}`."""
    answer_field: str = "answer"
    """Column with the answer."""


DatasetArgsT = TypeVar("DatasetArgsT", bound=DatasetArgs)


class DatasetEnvironment(Environment[DatasetArgsT]):
    """An environment with the prompts of `args.dataset`."""

    needs_answer: bool = False
    """Whether a row without an answer is an error."""

    def examples(self, args: DatasetArgsT, split: Split, seed: int) -> Iterator[reward_pb2.Example]:
        """Yields the dataset's rows, shuffled by seed; columns other than prompt and answer become `fields`."""
        if args.dataset is None:
            raise UnimplementedError(f"environment {self.id} has no prompts without args.dataset")
        return self._examples(args, split, seed)

    def _examples(self, args: DatasetArgsT, split: Split, seed: int) -> Iterator[reward_pb2.Example]:
        rows = split_examples(self._read(args, "dataset"), self._read(args, "eval_dataset"), args, split)
        rng_for(self.id, split, seed).shuffle(rows)
        limit = args.num_examples if split is Split.TRAIN else args.eval_examples
        yield from (to_example(args, number, row) for number, row in rows[:limit])

    def _read(self, args: DatasetArgsT, key: str) -> Sequence[Row] | None:
        path = getattr(args, key)
        if path is None:
            return None
        rows = read_rows(path, key)
        check_columns(rows, args, needs_answer=self.needs_answer)
        return rows


def check_columns(rows: Sequence[Row], args: DatasetArgs, *, needs_answer: bool) -> None:
    """Raises InvalidInputError that names the row and the argument, for a row without a prompt or a needed answer."""
    needed = [("prompt_field", args.prompt_field)] + [("answer_field", args.answer_field)] * needs_answer
    for number, row in enumerate(rows, start=1):
        for key, name in needed:
            if row.get(name) is None:
                has = ", ".join(map(repr, row)) or "none"
                raise bad_argument(key, f"row {number} has no column {name!r}; it has {has}")


def split_examples(
    rows: Sequence[Row] | None, held_out: Sequence[Row] | None, args: DatasetArgs, split: Split
) -> list[_Numbered]:
    """The numbered rows of a split: no prompt of the held-out ones is among those to train on."""

    def key(row: _Numbered) -> str:
        prompt = row[1][args.prompt_field]
        return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)

    numbered = list(enumerate(rows or (), start=1))
    if held_out is None:
        return split_rows(numbered, key, split, args.eval_examples)
    kept = list(enumerate(held_out, start=1))
    if split is Split.EVAL:
        return kept
    prompts = {key(row) for row in kept}
    train = [row for row in numbered if key(row) not in prompts]
    if not train:
        raise bad_argument("dataset", f"every prompt of {args.dataset} is also in {args.eval_dataset}")
    return train


def to_example(args: DatasetArgs, number: int, row: Row) -> reward_pb2.Example:
    """A row as the example `row-<number>`."""
    answer = row.get(args.answer_field)
    text = "" if answer is None else answer if isinstance(answer, str) else json.dumps(answer)
    example = reward_pb2.Example(
        id=f"row-{number}", prompt=_messages(args, row[args.prompt_field], number), answer=text
    )
    others = {name: value for name, value in row.items() if name not in (args.prompt_field, args.answer_field)}
    ParseDict(others, example.fields)
    return example


def own_or_given(example: reward_pb2.Example, column: str, given: Any) -> Any:
    """The example's own value of a column, else what `args` gave for all."""
    own = from_struct(example.fields).get(column)
    return given if own is None else own


def checked(check: Callable[[Any], object]) -> AfterValidator:
    """For an argument that may be None: refuses a value for which `check` raises ValueError."""

    def validate(value: Any) -> Any:
        if value is not None:
            check(value)
        return value

    return AfterValidator(validate)


def _messages(args: DatasetArgs, prompt: Any, number: int) -> list[common_pb2.ChatMessage]:
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
