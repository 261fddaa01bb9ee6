"""What the small model learns from: text that is on this machine, and demonstrations of the task."""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from reward_svc.environments.reverse_text import ReverseText
from surogate.reward.base import Split

MIN_DOCUMENT = 80
"""Shorter documentation strings, in characters, say too little."""

NOT_PROSE = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
"""Folders of the standard library that are left out."""


def write_documentation(path: Path, *, characters: int, seed: int) -> int:
    """Writes documentation strings of Python's standard library as JSON lines `{"text"}`; returns their characters.

    Up to `characters` of them are taken, in an order that `seed` decides.
    """
    documents = sorted(set(documentation(Path(sysconfig.get_path("stdlib")))))
    random.Random(seed).shuffle(documents)
    total = 0
    with path.open("w", encoding="utf-8") as file:
        for text in documents:
            if total >= characters:
                break
            file.write(json.dumps({"text": text}) + "\n")
            total += len(text)
    if not total:
        raise RuntimeError("Python's standard library has no documentation strings here; is it installed as source?")
    return total


def documentation(folder: Path) -> Iterator[str]:
    """The documentation strings of the Python files in a folder and the folders beneath it."""
    for path in sorted(folder.rglob("*.py")):
        if NOT_PROSE & set(path.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # a file that is broken on purpose, as templates of code are
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = (ast.get_docstring(node) or "").strip()
                if len(text) >= MIN_DOCUMENT:
                    yield text


def write_demonstrations(path: Path, orch_file: Path, *, count: int, seed: int) -> int:
    """Writes solved prompts of the environment in `orch_file` as JSON lines `{"messages"}`; returns their number.

    They are of its training split: no held-out prompt is among them, whatever the seeds.
    """
    rows = islice(demonstrations(_environment_args(orch_file), count=count, seed=seed), count)
    return _write_lines(path, rows)


def demonstrations(args: dict[str, Any], *, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Conversations of reverse-text: a text, and the text backwards."""
    environment = ReverseText()
    parsed = environment.parse({**args, "num_examples": count})
    for example in environment.examples(parsed, Split.TRAIN, seed):
        messages = [{"role": message.role, "content": message.content} for message in example.prompt]
        yield {"messages": [*messages, {"role": "assistant", "content": example.answer}]}


def _environment_args(orch_file: Path) -> dict[str, Any]:
    args: dict[str, Any] = yaml.safe_load(orch_file.read_text(encoding="utf-8"))["env"][0].get("args", {})
    return args


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    number = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            number += 1
    return number
