"""Prompts from a file of the user's (`env[].args.dataset`), for reward services that only score."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from google.protobuf.json_format import ParseDict

from surogate.errors import ConfigError, Violation
from surogate.storage.fetch import local
from surogate.v1 import common_pb2, reward_pb2

PROMPT, ANSWER, ID = "prompt", "answer", "id"
"""Columns with a meaning; all others become `Example.fields`."""

Row = Mapping[str, Any]


def read_examples(path: str, *, key: str) -> list[reward_pb2.Example]:
    """Reads a .jsonl, .json (a list) or .csv file: one example a row.

    A row has `prompt` (a string, or a list of messages with role and content), perhaps `answer` and `id` (else its
    number), and whatever else the reward needs.

    Raises:
        ConfigError: Names `key`, and the row, when the file cannot be read so.
    """
    file = Path(local(path, key)).expanduser()
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise _wrong(key, f"{path} must end in {', '.join(_READERS)}")
    try:
        rows = reader(file)
    except OSError as error:
        raise _wrong(key, f"cannot read {path}: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise _wrong(key, f"{path}: {error}") from error
    if not rows:
        raise _wrong(key, f"{path} has no rows")
    examples = [_example(row, number, path, key) for number, row in enumerate(rows)]
    if len({example.id for example in examples}) < len(examples):
        raise _wrong(key, f"{path}: the column {ID} is not unique")
    return examples


def split_held_out(
    examples: Sequence[reward_pb2.Example], count: int
) -> tuple[list[reward_pb2.Example], list[reward_pb2.Example]]:
    """Training and held-out examples: of the different prompts, the `count` lowest by hash are held out.

    What is held out depends on the prompts alone, not on their order. At least one prompt is left to train on.
    """
    prompts = sorted({prompt_digest(example) for example in examples})
    held_out = set(prompts[: min(count, len(prompts) - 1)])
    return (
        [example for example in examples if prompt_digest(example) not in held_out],
        [example for example in examples if prompt_digest(example) in held_out],
    )


def prompt_digest(example: reward_pb2.Example) -> int:
    """Hash of the prompt alone, the same in every process."""
    digest = xxhash.xxh3_64()
    for message in example.prompt:
        digest.update(f"{message.role}\0{message.content}\0".encode("utf-8", "surrogatepass"))
    return digest.intdigest()


def _example(row: Any, number: int, path: str, key: str) -> reward_pb2.Example:
    where = f"{path}, row {number + 1}"
    if not isinstance(row, Mapping):
        raise _wrong(key, f"{where}: is {type(row).__name__}, expected an object with the key {PROMPT!r}")
    if not row.get(PROMPT):
        raise _wrong(key, f"{where}: has no {PROMPT!r}; its columns are {', '.join(map(str, row))}")
    answer = row.get(ANSWER)
    example = reward_pb2.Example(
        id=str(row.get(ID, number)),
        prompt=_messages(row[PROMPT], where, key),
        answer="" if answer is None else str(answer),
    )
    fields = {str(name): value for name, value in row.items() if name not in (PROMPT, ANSWER, ID)}
    ParseDict(fields, example.fields)
    return example


def _messages(prompt: Any, where: str, key: str) -> list[common_pb2.ChatMessage]:
    if isinstance(prompt, str):
        return [common_pb2.ChatMessage(role="user", content=prompt)]
    if not isinstance(prompt, list) or not all(isinstance(item, Mapping) and "role" in item for item in prompt):
        raise _wrong(key, f"{where}: {PROMPT!r} must be a string or a list of messages with role and content")
    messages = []
    for item in prompt:
        message = common_pb2.ChatMessage(role=str(item["role"]), content=str(item.get("content") or ""))
        ParseDict({name: value for name, value in item.items() if name not in ("role", "content")}, message.extra)
        messages.append(message)
    return messages


def _read_jsonl(file: Path) -> list[Any]:
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error
    return rows


def _read_json(file: Path) -> list[Any]:
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, list):
        raise ValueError("must hold a list of objects")
    return data


def _read_csv(file: Path) -> list[Any]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, restkey="…"))


_READERS: Mapping[str, Callable[[Path], list[Any]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}


def _wrong(key: str, message: str) -> ConfigError:
    return ConfigError.of([Violation(key, message)])
